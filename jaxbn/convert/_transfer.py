"""Puts the tensors of any source into Flax's variables: all, or an error that lists all faults."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxbn._inspection.layers import is_nnx, nnx_layers
from jaxbn._text import short
from jaxbn.convert._matching import Match, Rename, match, refuse
from jaxbn.convert._report import Report, Tensor
from jaxbn.convert._targets import Variables


def into_flax(
    call: str,
    tensors: Iterable[Tensor],
    like: Any,
    target: Variables,
    rename: Rename | None,
    keep: Iterable[str],
    arguments_of: Callable[[str], Mapping[str, Any] | None],  # of a layer of the source
    notes: Iterable[str],
) -> tuple[Any, Report]:
    """`like` with its variables replaced by the tensors, and the report."""
    found = match(tensors, target.slots, rename, keep)
    problems, notes = target.problems + found.problems, list(notes)
    kept = set(found.kept)
    for slot, leaf in zip(target.slots, target.leaves, strict=True):
        if slot.path in kept and isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f"keep: {slot.path} is a shape; expected an array that can stay")
    source_of = {t: s for s, t in found.layers.items()}
    counted = {slot.layer for slot in target.slots if slot.role.leaf == "count"}
    modules = dict(nnx_layers(like)) if is_nnx(like) else {}
    batch_norm: dict[str, Mapping[str, Any]] = {}
    others: dict[str, list[str]] = {}  # arguments of `like` that differ from the source's → layers
    for layer in (slot.layer for slot in target.slots if slot.role.leaf == "mean"):
        if layer not in source_of or (arguments := arguments_of(source_of[layer])) is None:
            continue
        batch_norm[layer] = arguments
        if arguments["momentum"] is None and layer not in counted:
            problems.append(
                f"missing, in the target: a count in {layer!r}: BatchNorm(momentum=None)"
            )
        has: dict[str, Any] = {"momentum": None} if layer in counted else {}
        if layer in modules:  # Flax's own layer has no `unbiased`
            has = {name: getattr(modules[layer], name, False) for name in arguments}
        if has.get("epsilon", arguments["epsilon"]) != arguments["epsilon"]:
            problems.append(
                f"epsilon: {layer!r} has {has['epsilon']}, the source {arguments['epsilon']}"
            )
        if other := [f"{name}={v!r}" for name, v in has.items() if v != arguments[name]]:
            others.setdefault(", ".join(other), []).append(layer)
    notes += [f"like has {text} in {short(layers)}" for text, layers in others.items()]
    refuse(call, problems)
    return target.build(found.values), report_of(found, batch_norm, notes)


def report_of(found: Match, batch_norm: Mapping[str, Any], notes: Iterable[str]) -> Report:
    """The report of a match that has no problems."""
    parts = tuple(found.moves), found.by, tuple(found.dropped), tuple(found.kept)
    return Report(*parts, batch_norm, tuple(notes))
