"""Convolutions whose kernels are standardized at every call."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxbn._inspection import layers
from jaxbn._inspection.selection import Where, selects
from jaxbn._op.standardize import standardize
from jaxbn._text import listed


class Standardizing:
    """The `promote_dtype` of a convolution whose kernel is standardized first."""

    def __init__(self, promote_dtype: Callable[..., Any]):
        self.promote_dtype = promote_dtype

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Linen passes x, kernel and bias as they are, nnx as one tuple."""
        x, kernel, bias = arrays[0] if len(arrays) == 1 else arrays
        new = x, standardize(kernel), bias
        return self.promote_dtype(*((new,) if len(arrays) == 1 else new), **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Standardizing) and self.promote_dtype == other.promote_dtype

    def __hash__(self) -> int:
        return hash((Standardizing, self.promote_dtype))


def standardized_call(
    paths: Collection[str], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """The call of linen's convolution, with a standardized kernel at these paths."""
    import flax.linen as nn

    layer = context.module
    its_call = isinstance(layer, nn.Conv) and context.method_name == "__call__"
    if not its_call or layers.join("", *layer.path) not in paths:
        return call(*args, **kwargs)
    plain = layer.promote_dtype
    object.__setattr__(layer, "promote_dtype", Standardizing(plain))
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "promote_dtype", plain)


def convolutions_of(tree: Any, where: Where) -> dict[str, Any]:
    """The convolutions that `where` selects, at least one: nnx modules, or nodes of linen's params.

    A kernel with one value for each output is left as it is.
    """
    found: dict[str, Any]
    if layers.is_nnx(tree):
        from flax import nnx

        modules = ((layers.join("", *path), module) for path, module in nnx.iter_modules(tree))
        found = {path: m for path, m in modules if isinstance(m, nnx.Conv)}
        kernels = {path: module.kernel.get_value() for path, module in found.items()}
    else:
        found = dict(_with_kernels(tree))
        kernels = {path: layers.unboxed(node["kernel"]) for path, node in found.items()}
    found = {path: found[path] for path, v in kernels.items() if math.prod(v.shape[:-1]) > 1}
    if chosen := {path: node for path, node in found.items() if selects(where, path)}:
        return chosen
    raise ValueError(
        f"swap: standardize={where!r} selects none of the convolutions {listed(found)}; expected a "
        f'glob such as "*" for all, several of them, or a function of the path.'
    )


def _with_kernels(params: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the node of each layer in linen's params that may be a convolution."""
    if not isinstance(params, Mapping):
        return
    kernel = layers.unboxed(params.get("kernel"))
    if len(getattr(kernel, "shape", ())) > 2:
        yield path, params
    for key, node in params.items():
        yield from _with_kernels(node, layers.join(path, key))
