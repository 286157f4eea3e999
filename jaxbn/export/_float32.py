"""bfloat16 inside an ONNX file becomes float32: onnxruntime has no kernels for it on CPUs."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def without_bfloat16(model: Any) -> None:
    """Computes in float32 what the model computes in bfloat16. Inputs and results stay bfloat16."""
    from onnx import TensorProto, helper

    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    graph = model.graph
    values = [*graph.input, *graph.output]
    ends = {v.name for v in values if v.type.tensor_type.elem_type == narrow}
    for inner in _graphs(graph):
        for tensor in inner.initializer:
            _widen(tensor)
        own = () if inner is graph else (*inner.input, *inner.output)
        for value in (*inner.value_info, *own):
            if value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = wide
        for node in inner.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}_float32" if name in ends else name for name in names]
            for attribute in node.attribute:
                _widen(attribute.t)
                if attribute.name in ("to", "dtype") and attribute.i == narrow:
                    attribute.i = wide
    for k, name in enumerate(v.name for v in graph.input if v.name in ends):
        node = helper.make_node("Cast", [name], [f"{name}_float32"], f"{name}/Cast", to=wide)
        graph.node.insert(k, node)
    for name in (v.name for v in graph.output if v.name in ends):
        graph.node.append(
            helper.make_node("Cast", [f"{name}_float32"], [name], f"{name}/Cast", to=narrow)
        )


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph, and the graphs in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _graphs(inner)


def _widen(tensor: Any) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.BFLOAT16:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
