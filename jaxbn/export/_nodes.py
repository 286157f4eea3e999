"""One ONNX operator as one operation of JAX's, which jax2onnx writes as that node."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive

from jaxbn._folding.program import scope_of

NODE = Primitive("jaxbn_onnx_node")
NODE.def_abstract_eval(lambda *operands, shape, dtype, **params: ShapedArray(shape, dtype))


class Constant:
    """An array in the parameters of a node until the node is written: JAX caches parameters."""

    def __init__(self, array: np.ndarray) -> None:
        self.array: np.ndarray | None = array

    def taken(self) -> np.ndarray | None:
        """The array, which is kept here no longer."""
        array, self.array = self.array, None
        return array


def node(operator: str, shape: Sequence[Any], dtype: Any, *operands: Any, **attributes: Any) -> Any:
    """The result of one ONNX operator. NumPy operands become constants of the file.

    Args:
      operator: its name, such as "MaxPool".
      shape: the shape of the result; sizes may be symbols.
      dtype: the dtype of the result.
      *operands: tracers and NumPy arrays, as the operator takes them.
      **attributes: the operator's attributes.
    """
    return NODE.bind(
        *(v for v in operands if not isinstance(v, np.ndarray)),
        operator=operator,
        shape=tuple(shape),
        dtype=np.dtype(dtype),
        constants=tuple(Constant(v) if isinstance(v, np.ndarray) else None for v in operands),
        attributes=tuple(
            (name, tuple(v) if isinstance(v, list) else v) for name, v in attributes.items()
        ),
    )


@functools.cache
def register() -> None:
    """Adds to jax2onnx's plugins the one that writes a node."""
    ir = importlib.import_module("onnx_ir")
    plugin_system = importlib.import_module("jax2onnx.plugins.plugin_system")

    cumsum = jnp.cumsum
    plugin_system.import_all_plugins()
    setattr(jnp, "cumsum", cumsum)  # noqa: B010 (one of the plugins replaces it for good)

    @plugin_system.register_primitive(jaxpr_primitive=NODE.name, context="jaxbn", component="node")
    class Node(plugin_system.PrimitiveLeafPlugin):  # type: ignore[name-defined]
        def lower(self, ctx: Any, eqn: Any) -> None:
            def initializer(array: Any) -> Any:
                tensor = ir.tensor(array)  # the builder's own method casts to float32
                value = ir.Value(
                    name=ctx.fresh_name("constant"),
                    type=ir.TensorType(tensor.dtype),
                    shape=tensor.shape,
                    const_value=tensor,
                )
                ctx.builder.initializers.append(value)
                return value

            p, operands = eqn.params, iter(eqn.invars)
            inputs = [
                initializer(constant.taken()) if constant else ctx.get_value_for_var(next(operands))
                for constant in p["constants"]
            ]
            (var,) = eqn.outvars
            out = ctx.get_value_for_var(var, name_hint=ctx.fresh_name(p["operator"]))
            write = getattr(ctx.builder, p["operator"])
            result = write(*inputs, _outputs=[out.name], **dict(p["attributes"]))
            result.type, result.shape = out.type, out.shape
            if scope := scope_of(eqn):
                result.producer().name = f"{scope}/{p['operator']}"
            ctx.bind_value_for_var(var, result)
