"""ONNX in float: `onnx` writes a file, `session` runs one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._folding.program import evaluate, trace
from jaxbn.export._checked_file import Exported, inference_input, written


def onnx(
    fn: Callable[..., jax.Array],
    x: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = 21,
    tolerance: float = 1e-4,
) -> Exported:
    """Writes `fn` as ONNX, for any batch size.

    jax2onnx converts the function, and ONNX's own checker checks the file. Before the file takes
    its place, onnxruntime runs it on x without optimizations, and the result is compared with fn.
    Fold first (`jaxbn.fold`), so that a convolution and its norm become one node.

    Args:
      fn: an inference function of one array, batch first.
      x: an example batch.
      path: the file; an older file is replaced once the new one is complete.
      opset: version of ONNX's operators.
      tolerance: the largest error over fn's largest value.

    Raises:
      TypeError: x is no array.
      ValueError: fn is in training mode, or the file differs from fn by more than tolerance.
        Nothing is written then.
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.onnx(lambda x: x, [1.0], "f.onnx")
    Traceback (most recent call last):
        ...
    TypeError: onnx: x is a list, expected an example batch, batch first; write jnp.asarray(x).
    """
    x = inference_input("onnx", fn, x, "onnx", "onnxruntime", "jax2onnx")
    jax2onnx, library = need("onnx", "jax2onnx"), need("onnx", "onnx")
    fn_ops = _as_operations(fn, x)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = jax2onnx.to_onnx(fn_ops, [("B", *x.shape[1:])], opset=opset, model_name="jaxbn")
    _add_biases_in_gemm(model)
    library.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    return written(
        "onnx",
        path,
        lambda file: file.write_bytes(content),
        lambda file: session(file, optimize=False)(np.asarray(x)),
        fn,
        x,
        tolerance,
    )


def _add_biases_in_gemm(model: Any) -> None:
    """Turns `Gemm(x, w, 0) + bias` into `Gemm(x, w, bias)`: quantizers need a bias a column."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    for gemm in [node for node in graph.node if node.op_type == "Gemm"]:
        scalar, weights = constants.get(gemm.input[2]), constants.get(gemm.input[1])
        if scalar is None or weights is None or list(scalar.dims) != []:
            continue
        (name,) = gemm.output
        beta = next((a for a in gemm.attribute if a.name == "beta"), None)
        value = numpy_helper.to_array(scalar)
        if beta is not None:
            value = value * value.dtype.type(beta.f)
            gemm.attribute.remove(beta)
        bias = np.full(weights.dims[1], value)
        readers = [node for node in graph.node if name in node.input]
        if len(readers) == 1 and readers[0].op_type == "Add" and name not in outputs:
            (add,) = readers
            other = constants.get(next(i for i in add.input if i != name))
            if other is not None and list(other.dims)[-1:] == [bias.size] == [np.prod(other.dims)]:
                bias = bias + numpy_helper.to_array(other).reshape(-1)
                gemm.output[0] = add.output[0]
                graph.node.remove(add)
        graph.initializer.append(numpy_helper.from_array(bias, f"{name}_bias"))
        gemm.input[2] = f"{name}_bias"
    used = {name for node in graph.node for name in node.input}
    for name in set(constants) - used - outputs:
        graph.initializer.remove(constants[name])


def _as_operations(fn: Callable[..., Any], x: jax.Array) -> Callable[..., Any]:
    """Equals fn, by the operations of its trace: inside fn jax2onnx would patch jax's functions."""
    size = jax.export.symbolic_shape("B")
    shape = jax.ShapeDtypeStruct((*size, *x.shape[1:]), x.dtype)
    program = trace(fn, [shape], lambda eqn: True)

    def replay(x: Any) -> Any:
        def renamed(v: Any) -> Any:
            """The symbolic size v, in the scope of the batch that jax2onnx made."""
            if not jax.export.is_symbolic_dim(v):
                return v
            return jax.export.symbolic_shape(str(v), scope=x.shape[0].scope)[0]

        params = (jax.tree.map(renamed, op.eqn.params) for op in program.ops)
        pairs = zip(program.ops, params, strict=True)
        ops = tuple(op._replace(eqn=op.eqn.replace(params=new)) for op, new in pairs)
        values = evaluate(program._replace(ops=ops), [x])
        return program.tree.unflatten([values[i] for i in program.outputs])

    return replay


def session(path: str | os.PathLike[str], *, optimize: bool = True) -> Callable[..., np.ndarray]:
    """Returns an ONNX file as a function of one NumPy batch; onnxruntime runs it on the CPU.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: onnxruntime cannot read the file.

    >>> from jaxbn import export
    >>> export.session("nothing.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: session: no ONNX file at nothing.onnx
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"session: no ONNX file at {path}")
    onnxruntime = need("session", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    try:
        runner = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ValueError(
            f"session: onnxruntime cannot read {path}: {str(error).splitlines()[0]}; expected a "
            f"file of jaxbn.export.onnx or jaxbn.export.int8."
        ) from error
    name = runner.get_inputs()[0].name
    return lambda x: runner.run(None, {name: x})[0]
