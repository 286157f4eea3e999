"""Which array of one model is which of another: by name, by order and shape, or by `rename`."""

import re
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn._text import printable, short
from jaxbn.convert._arrays import Rename, Role, Slot, Tensor
from jaxbn.convert._report import Move, Report

COUNTS = ("count", "num_batches_tracked")  # dropped if the target keeps none
STATISTICS = ("mean", "running_mean")
NOWHERE = "\0"  # the name of no layer


Sources = dict[str, list[Tensor]]  # by layer
Targets = dict[str, list[Slot]]


class Match(NamedTuple):
    """The source's arrays in the target's layout, or the problems that prevent this."""

    values: dict[str, np.ndarray]  # path → value
    moves: list[Move]
    dropped: list[str]
    kept: list[str]
    layers: dict[str, str]  # layer of the source → of the target
    by: str
    problems: list[str]
    notes: list[str]


def match_arrays(
    tensors: Iterable[Tensor], slots: Iterable[Slot], rename: Rename | None, keep: Iterable[str]
) -> Match:
    """Puts every tensor in its slot.

    With `rename` layers are matched by the names it gives. Without `rename` they are matched by
    their own names, up to separators. If the two sides share no name at all, they are matched by
    order and shape, provided these allow one way only.
    """
    sources: Sources = {}
    targets: Targets = {}
    for tensor in tensors:
        sources.setdefault(tensor.layer, []).append(tensor)
    for slot in slots:
        targets.setdefault(slot.layer, []).append(slot)
    found = Match({}, [], [], [], {}, "rename", [], [])
    for name in keep:
        inside = (f"{name}/", f"{name}.")
        within = [layer for layer in targets if layer == name or layer.startswith(inside)]
        if not within:
            found.problems.append(f"keep: {name!r} is no layer of the target")
        found.kept.extend(slot.path for layer in within for slot in targets.pop(layer))

    if rename is None:
        names = {name: name for name in sources}
        shared = set(map(_tokens, sources)) & set(map(_tokens, targets))
        found = found._replace(by="names" if shared else "order")
    else:
        names, unused = renamed(sources, rename)
        found.problems.extend(f"rename: {name!r} is no layer of the source" for name in unused)
    pair, before = _by_order if found.by == "order" else _by_name, len(found.problems)
    found.layers.update(pair(sources, targets, names, found))
    if found.by == "order" and len(found.problems) > before:
        # These problems list both sides already.
        found.problems.extend(_wrapped(sources, targets))
        return found
    for source, group in sources.items():
        if source in names:
            _place(group, targets.get(found.layers.get(source, NOWHERE), []), found)
        else:
            found.dropped.extend(tensor.key for tensor in group)
    filled = set(found.layers.values())
    for layer, places in targets.items():
        if layer not in filled:
            _place([], places, found)
    return found


class MisfitError(ValueError):
    """The arrays of one model do not fit another; the message has a line for each problem."""


def refuse(call: str, problems: Iterable[str]) -> None:
    """Raises one error that lists all problems, if there are any."""
    if problems := list(problems):
        raise MisfitError(
            f"{call}: the source does not fit the target; nothing was converted.\n  "
            + "\n  ".join(map(printable, problems))
            + "\nLayers of other names: rename={source: target}, or a function; None for the "
            "target drops one. Layers of the target to leave as they are: keep=[...]."
        )


def _wrapped(sources: Iterable[str], targets: Iterable[str]) -> Iterable[str]:
    """A problem's line, if all layers of the source have the target's names behind one prefix."""
    names = [re.split(r"[./]", name) for name in sources]
    here = set(map(_tokens, targets))
    for n in range(1, min(map(len, names), default=0)):
        if any(name[:n] != names[0][:n] for name in names):
            return
        if any(_tokens(".".join(name[n:])) in here for name in names):
            prefix = ".".join(names[0][:n])
            yield f"a wrapper called {prefix!r} is around the source: rename={{{prefix!r}: ''}}"
            return


def _tokens(name: str) -> tuple[str, ...]:
    """Words and numbers of a name: the same for `layer1.0.conv1` and `layer1_0/conv1`."""
    tokens = re.findall(r"[^\W\d_]+|\d+", name)
    after = [*tokens[1:], ""]
    # `layers` before a number is the list inside an nnx.Sequential, no word of the name.
    pairs = zip(tokens, after[: len(tokens)], strict=True)
    return tuple(token for token, then in pairs if not (token == "layers" and then.isdigit()))


def renamed(sources: Iterable[str], rename: Rename) -> tuple[dict[str, str], list[str]]:
    """Source → its name in the target, without dropped ones; and the keys of rename not used."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for source in sources:
        name: str | None = source
        if callable(rename):
            name = rename(source)
        else:
            begins = [k for k in rename if source == k or source.startswith((f"{k}.", f"{k}/"))]
            if begins:
                best = max(begins, key=len)
                used.add(best)
                new = rename[best]
                name = new if new is None else (new + source[len(best) :]).lstrip("./")
        if name is not None:
            names[source] = name
    return names, [] if callable(rename) else [name for name in rename if name not in used]


def _by_name(
    sources: Sources, targets: Targets, names: Mapping[str, str], found: Match
) -> dict[str, str]:
    """Source → target, for layers whose names are the same up to separators."""
    here: dict[tuple[str, ...], str] = {}
    for target in targets:
        if (twin := here.setdefault(_tokens(target), target)) != target:
            found.problems.append(f"two layers of the target read alike: {twin!r} and {target!r}")
    layers: dict[str, str] = {}
    taken: dict[str, str] = {}
    for source, name in names.items():
        if _tokens(name) not in here:
            continue
        layers[source] = goal = here[_tokens(name)]
        if (twin := taken.setdefault(goal, source)) != source:
            found.problems.append(f"two layers of the source go to {goal!r}: {twin!r}, {source!r}")
    return layers


def _by_order(
    sources: Sources, targets: Targets, names: Mapping[str, str], found: Match
) -> dict[str, str]:
    """Source → target, for layers of one kind: by their order, or by unique shapes."""

    def kind(ranks: Iterable[int], statistics: bool) -> tuple[int, bool]:
        return max(1, *ranks), statistics  # a slope may be a scalar here and [1] there

    here: dict[Any, list[str]] = {}
    there: dict[Any, list[str]] = {}
    for name, group in sources.items():
        statistics = any(tensor.form(Role(leaf)) for tensor in group for leaf in STATISTICS)
        there.setdefault(kind((t.array.ndim for t in group), statistics), []).append(name)
    for name, slots in targets.items():
        statistics = any(slot.role.leaf in STATISTICS for slot in slots)
        here.setdefault(kind((len(s.shape) for s in slots), statistics), []).append(name)

    def misfits(source: str, target: str) -> list[str]:
        trial = Match({}, [], [], [], {}, "", [], [])
        _place(sources.get(source, []), targets.get(target, []), trial)
        return trial.problems

    def fits(source: str, target: str) -> bool:
        return not misfits(source, target)

    layers: dict[str, str] = {}
    for group in sorted(set(here) | set(there)):
        left, right = there.get(group, []), here.get(group, [])
        first, second = _order(left), _order(right)
        if first and second and len(left) == len(right):
            pairs = dict(zip(first, second, strict=True))
        else:
            pairs = {s: t for s in left for t in right if fits(s, t)}
            ways = sum(fits(s, t) for s in left for t in right)
            if ways != len(pairs) or len(set(pairs.values())) != ways:
                pairs = {}
        if len(pairs) == max(len(left), len(right)) and all(fits(*pair) for pair in pairs.items()):
            layers |= pairs
            alike: dict[Any, list[str]] = {}
            for name in left if pairs else ():
                key = tuple(sorted(t.array.shape for t in sources[name]))
                alike.setdefault(key, []).append(name)
            found.notes.extend(
                f"equal shapes, matched by their order alone: {short(names)}"
                for names in alike.values()
                if len(names) > 1 and group[0] > 1
            )
            continue
        if not (left and right) or len(left) == len(right) == 1:  # there is nothing to choose
            for source, target in zip_longest(left, right, fillvalue=NOWHERE):
                found.problems.extend(misfits(source, target))
            continue
        found.problems.append("names, order and shapes do not tell which of these is which:")
        shapes = {s: [t.array.shape for t in sources[s]] for s in left}
        found.problems.extend(f"  source {name}: {_shapes(shapes[name])}" for name in left)
        shapes = {t: [s.shape for s in targets[t]] for t in right}
        found.problems.extend(f"  target {name}: {_shapes(shapes[name])}" for name in right)
    return layers


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " ".join("x".join(map(str, shape)) or "()" for shape in shapes)


RESNET = re.compile(
    r"(?:layer(?P<stage>\d+)\.(?P<block>\d+)\.(?:(?:conv|bn)(?P<number>\d+)|downsample\.(?P<down>\d+))"
    r"|conv1(?:\.(?P<stem>\d+))?|bn1|(?P<fc>fc))"
)


# Flax's ImageNet example: a stem, blocks numbered through, the projection after the others.
FLAX_RESNET = re.compile(
    r"(?:conv|bn)_init|\w*Block_(?P<block>\d+)/(?:(?:Conv|BatchNorm)_(?P<number>\d+)|(?:conv|norm)_proj)"
    r"|(?P<dense>Dense_0)"
)


def _flax_place(part: Any) -> tuple[int, ...]:
    """Where a layer of Flax's ImageNet example stands in the forward pass."""
    if part["block"] is None:
        return (10**6 if part["dense"] else -1,)
    return int(part["block"]), int(part["number"] or 10**6)


def _order(names: list[str]) -> list[str] | None:
    """The names sorted by their numbers; None if the names differ in more than numbers.

    Names of ResNets are sorted by their forward pass. The order in which the names come is not
    used: a state_dict, a file and a jitted `init` list layers in any order.
    """
    resnet = [RESNET.fullmatch(name) for name in names]
    if all(flax := [FLAX_RESNET.fullmatch(name) for name in names]):
        return sorted(names, key=lambda name: _flax_place(flax[names.index(name)]))
    if all(resnet):

        def place(name: str) -> tuple[int, ...]:  # in the forward pass
            part = RESNET.fullmatch(name).groupdict()  # type: ignore[union-attr]
            if part["stage"]:
                shortcut = part["down"] is not None
                within = part["down"] if shortcut else part["number"]
                return int(part["stage"]), int(part["block"]), shortcut, int(within)
            return (10**6,) if part["fc"] else (0, name == "bn1", int(part["stem"] or 0))

        return sorted(names, key=place)

    def split(name: str) -> list[tuple[str, str]]:
        number = re.compile(r"(.*?)_?(\d*)", re.DOTALL)  # a name may hold anything
        return [number.fullmatch(part).groups() for part in re.split(r"[./]", name)]  # type: ignore

    if len({tuple(stem for stem, _ in split(name)) for name in names}) != 1:
        return None
    return sorted(names, key=lambda name: [int(number or -1) for _, number in split(name)])


def _place(tensors: Iterable[Tensor], slots: Iterable[Slot], found: Match) -> None:
    """Puts the tensors of one layer into the slots of another, or notes why they do not fit."""
    free = {slot.path: slot for slot in slots}
    known = bool(free)
    for tensor in tensors:
        forms = ((slot, tensor.form(slot.role)) for slot in free.values())
        slot, form = next(((s, f) for s, f in forms if f is not None), (None, None))
        if slot is None or form is None:
            if any(tensor.form(Role(leaf)) for leaf in COUNTS) and known:
                found.dropped.append(tensor.key)
            else:
                found.problems.append(
                    f"unknown, in the source alone: {tensor.key} {tensor.array.shape}"
                )
            continue
        del free[slot.path]
        how, value = form
        if value.shape != slot.shape:
            found.problems.append(
                f"misshapen: {tensor.key} {tensor.array.shape} becomes {value.shape}, "
                f"but {slot.path} is {slot.shape}" + _several(slot, value.shape)
            )
        elif not _is_of_kind(value.dtype, slot.dtype):
            found.problems.append(
                f"of another type: {tensor.key} is {value.dtype}, but {slot.path} is {slot.dtype}"
            )
        else:
            cast = [] if value.dtype == slot.dtype else [f"{value.dtype} → {slot.dtype}"]
            how = ", ".join([how] * bool(how) + cast) or "as it is"
            found.moves.append(Move(tensor.key, slot.path, slot.shape, how))
            # A copy: the source may be the memory of a model that is still training.
            found.values[slot.path] = np.array(value, slot.dtype, order="C")
    for slot in free.values():
        if slot.role.leaf == "num_batches_tracked":
            found.kept.append(slot.path)
        elif slot.role.leaf == "count":
            found.problems.append(
                f"missing, in the target alone: {slot.path} {slot.shape}, the number of updates; "
                f"write source[{slot.layer + '.num_batches_tracked'!r}] = n, or a large n to let "
                f"later updates count little"
            )
        else:
            found.problems.append(f"missing, in the target alone: {slot.path} {slot.shape}")


def _is_of_kind(dtype: Any, target: Any) -> bool:
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) and jnp.issubdtype(target, kind) for kind in kinds)


def report_of(found: Match, batch_norm: Mapping[str, Any], notes: Iterable[str]) -> Report:
    """The report of a match that has no problems."""
    parts = tuple(found.moves), found.by, tuple(found.dropped), tuple(found.kept)
    return Report(*parts, batch_norm, (*notes, *found.notes))


def _several(slot: Slot, shape: tuple[int, ...]) -> str:
    """What to write where the target holds several of the source's statistics."""
    if slot.role.leaf not in ("mean", "var") or slot.shape[1:] != shape:
        return ""
    return (
        f", a row for each domain: convert into the model without domains, then "
        f"jax.tree.map(lambda v: jnp.stack([v] * {slot.shape[0]}), batch_stats)"
    )
