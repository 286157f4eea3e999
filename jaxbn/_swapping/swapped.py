"""What `swap` returns."""

from collections.abc import Collection
from typing import Any, NamedTuple


class SwappedLayer(NamedTuple):
    """What `swap` did to one layer."""

    norm: str  # the name of Flax's class; with to="batch" jaxbn.linen.BatchNorm, or nnx'
    groups: int | None  # None for a norm other than GroupNorm
    kept: tuple[str, ...]  # names of the parameters and statistics, which the new norm uses
    dropped: tuple[str, ...]  # names of the statistics, which the new norm does not have


class Swapped(NamedTuple):
    """What `swap` returns."""

    model: Any  # for linen, a function to call in place of net.apply; or the nnx model
    variables: Any  # linen's, with the statistics that the new norms have; None for nnx
    report: dict[str, SwappedLayer]  # by path


def names(held: Any) -> tuple[str, ...]:
    """The names of what a layer has, of its `Params` or `State`."""
    return tuple(name for name, v in held._asdict().items() if v is not None)


def check_tables(path: str, layer: Any, names: Collection[str]) -> None:
    """Refuses a layer with domains or classes that the new norm does not have."""
    for name in names:
        if held := getattr(layer, name, None):
            raise ValueError(
                f"swap: layer {path!r} has {name}={held}, which Flax's norms do not have; leave "
                f"the layer out by where=, or take the arrays of one, as "
                f"jax.tree.map(lambda v: v[0], batch_stats) does where axis 0 is theirs, into a "
                f"model without them."
            )
