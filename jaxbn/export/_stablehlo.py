"""StableHLO: a file that any XLA runs, for any batch size."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._extras import need
from jaxbn._files import replacing
from jaxbn._folding.program import batch_statistics, evaluate, trace

PLATFORMS = ("cpu", "cuda", "tpu")


class Exported(NamedTuple):
    """A file that was written, and how far it is from the function it was made of.

    >>> from pathlib import Path
    >>> from jaxbn import export
    >>> done = export.Exported(Path("net.onnx"), 13_001, absolute=7e-7, relative=2e-7)
    >>> f"{done.path}: {done.bytes / 1000:.0f} kB, {done.relative:.0e}"
    'net.onnx: 13 kB, 2e-07'
    """

    path: Path
    bytes: int
    absolute: float  # largest error on the example
    relative: float  # the same over the function's largest value


def stablehlo(
    fn: Callable[..., jax.Array],
    x: Any,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float = 1e-5,
) -> Exported:
    """Writes `fn` as StableHLO, for any batch size; `load_stablehlo` reads it.

    Weights are closed over and become part of the file. The file is read again and compared with
    fn on x before it takes its place. One that a newer jax wrote may not load in an older one.

    Args:
      fn: an inference function of one array, batch first.
      x: an example batch.
      path: the file; replaced when all is written.
      platforms: those it can run on; what is not at hand is compiled for, not run.
      tolerance: the largest error over fn's largest value.

    Raises:
      TypeError: x is no array.
      ValueError: fn is in training mode, or the file differs from fn by more than tolerance;
        then nothing is written.
      ModuleNotFoundError: flatbuffers is missing.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from jaxbn import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export.stablehlo(lambda x: 2 * x, jnp.ones((4, 3)), f"{folder}/f.hlo")
    ...     export.load_stablehlo(done.path)(jnp.ones((1, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    x = _checked("stablehlo", fn, x, "flatbuffers")
    batch = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype)
    program = jax.export.export(jax.jit(fn), platforms=platforms)(shape)
    content = bytes(program.serialize())

    def reloaded(path: Path) -> Any:
        here = jax.default_backend()
        wanted = "cuda" if here == "gpu" else here
        return load_stablehlo(path)(x) if wanted in platforms else None

    return _written(
        "stablehlo", path, lambda file: file.write_bytes(content), reloaded, fn, x, tolerance
    )


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., jax.Array]:
    """The function in a file that `stablehlo` wrote.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is no StableHLO of `jax.export`.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxbn import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export.stablehlo(jnp.sin, jnp.zeros((1, 2)), f"{folder}/sin.hlo")
    ...     export.load_stablehlo(done.path)(jnp.zeros((3, 2))).shape
    (3, 2)
    """
    content = Path(path).read_bytes()
    try:
        return jax.export.deserialize(bytearray(content)).call
    except Exception as error:
        raise ValueError(
            f"load_stablehlo: {path} is no StableHLO of jax.export that jax {jax.__version__} can "
            f"read; expected a file of jaxbn.export.stablehlo, written by this jax or an older one."
        ) from error


def onnx(
    fn: Callable[..., jax.Array],
    x: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = 21,
    tolerance: float = 1e-4,
) -> Exported:
    """Writes `fn` as ONNX, for any batch size.

    Converted by jax2onnx, checked by ONNX's own checker, and run by onnxruntime with its
    optimizations off against fn on x before the file takes its place. Fold first
    (`jaxbn.fold`): then a convolution and its norm are one node.

    Args:
      fn: an inference function of one array, batch first.
      x: an example batch.
      path: the file; replaced when all is written.
      opset: version of ONNX's operators.
      tolerance: the largest error over fn's largest value.

    Raises:
      TypeError: x is no array.
      ValueError: fn is in training mode, or the file differs from fn by more than tolerance;
        then nothing is written.
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.onnx(lambda x: x, [1.0], "f.onnx")
    Traceback (most recent call last):
        ...
    TypeError: onnx: x is a list, expected an example batch, batch first; write jnp.asarray(x).
    """
    x = _checked("onnx", fn, x, "onnx", "onnxruntime", "jax2onnx")
    jax2onnx, library = need("onnx", "jax2onnx"), need("onnx", "onnx")
    fn_ops = _as_operations(fn, x)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = jax2onnx.to_onnx(fn_ops, [("B", *x.shape[1:])], opset=opset, model_name="jaxbn")
    _add_biases_in_gemm(model)
    library.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    return _written(
        "onnx",
        path,
        lambda file: file.write_bytes(content),
        lambda file: session(file, optimize=False)(np.asarray(x)),
        fn,
        x,
        tolerance,
    )


def _add_biases_in_gemm(model: Any) -> None:
    """`Gemm(x, w, 0) + bias` becomes `Gemm(x, w, bias)`: quantizers want a bias for each column."""
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
    """Equals fn, as the operations of its trace: jax2onnx replaces functions of jax in its own."""
    size = jax.export.symbolic_shape("B")
    shape = jax.ShapeDtypeStruct((*size, *x.shape[1:]), x.dtype)
    program = trace(fn, [shape], lambda eqn: True)

    def replay(x: Any) -> Any:
        def renamed(v: Any) -> Any:
            """The size in the scope of jax2onnx's own batch."""
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
    """An ONNX file as a function of one NumPy batch, run by onnxruntime on the CPU.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: onnxruntime cannot read it.

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


def int8(
    source: str | os.PathLike[str],
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    per_channel: bool = True,
    tolerance: float = 0.1,
) -> Exported:
    """Writes an ONNX file in int8: weights and activations, by onnxruntime's static quantizer.

    The ranges of activations are those seen on `batches`; some hundred real inputs will do.
    Errors are those on the first batch, against the source.

    Args:
      source: the ONNX file in float32; its norms folded.
      batches: arrays as the network takes them.
      path: the file; replaced when all is written.
      per_channel: a range for each channel of a kernel, not one for all.
      tolerance: the largest error over the source's largest value. The rounding of 8 bits costs
        about 1 %; measure the accuracy of the task.

    Raises:
      FileNotFoundError, ValueError: source is no ONNX file, there is no batch, or one of another
        shape, or the error is above tolerance; then nothing is written.
      ModuleNotFoundError: onnx or onnxruntime is missing.

    >>> from jaxbn import export
    >>> export.int8("nothing.onnx", [], "int8.onnx")
    Traceback (most recent call last):
        ...
    FileNotFoundError: session: no ONNX file at nothing.onnx
    """
    original = session(source)
    batches = [np.asarray(batch) for batch in batches]
    if not batches:
        raise ValueError(
            "int8: no batches to calibrate with, expected some real inputs; write "
            "jaxbn.export.int8(source, [x], path)."
        )
    reference = _run_or_refuse(original, batches)
    library = need("int8", "onnx")
    quantization = need("int8", "onnxruntime.quantization")
    prepare = need("int8", "onnxruntime.quantization.shape_inference").quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self, name: str):
            self.batches = iter({name: batch} for batch in batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    name = library.load(os.fspath(source), load_external_data=False).graph.input[0].name

    def write(file: Path) -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            prepared = Path(folder, "prepared.onnx")
            prepare(os.fspath(source), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                file,
                Reader(name),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=per_channel,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
            )

    return _written(
        "int8",
        path,
        write,
        lambda file: session(file)(batches[0]),
        lambda x: reference,
        batches[0],
        tolerance,
    )


def _run_or_refuse(run: Callable[..., np.ndarray], batches: Sequence[np.ndarray]) -> np.ndarray:
    """The source on the first batch; all batches are of one shape but for their rows."""
    for i, batch in enumerate(batches):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise ValueError(
                f"int8: batch {i} has shape {batch.shape} but batch 0 has {batches[0].shape}; "
                f"expected arrays alike but for the number of rows."
            )
    try:
        return run(batches[0])
    except Exception as error:
        raise ValueError(
            f"int8: source cannot run on batch 0 of shape {batches[0].shape}, dtype "
            f"{batches[0].dtype}: {str(error).splitlines()[0]}; expected inputs as the network "
            f"takes them."
        ) from error


def _checked(call: str, fn: Any, x: Any, *packages: str) -> jax.Array:
    """Equals x; when fn is an inference function of it, and the packages are there."""
    for package in packages:
        need(call, package)
    if not isinstance(x, jax.Array | np.ndarray) or not x.ndim:
        what = f"a {type(x).__name__}" if not hasattr(x, "shape") else "a scalar"
        raise TypeError(
            f"{call}: x is {what}, expected an example batch, batch first; write jnp.asarray(x)."
        )
    x = jnp.asarray(x)
    where = batch_statistics(fn, (x,))
    if where is not None:
        raise ValueError(
            f"{call}: {where} normalizes by statistics of the batch, expected a function in "
            f"inference mode: train=False, use_running_average=True, or model.eval()."
        )
    return x


def _written(
    call: str,
    path: str | os.PathLike[str],
    write: Callable[[Path], Any],
    run: Callable[[Path], Any],
    fn: Callable[..., Any],
    x: Any,
    tolerance: float,
) -> Exported:
    """Writes beside `path`, compares what was written with fn on x, and moves it to its place."""
    path = Path(path)
    with replacing(path) as file:
        write(file)
        reference = np.asarray(fn(x)).astype(np.float64)
        y = run(file)
        error = 0.0 if y is None else np.abs(np.asarray(y).astype(np.float64) - reference).max()
        relative = float(error / max(np.abs(reference).max(), np.finfo(np.float32).tiny))
        if not relative <= tolerance:
            raise ValueError(
                f"{call}: the file's result differs from the function's by {relative:.1e} of its "
                f"largest value, expected {tolerance:.1e} at most; nothing was written. If that "
                f"will do, write tolerance={relative * 2:.0e}."
            )
        size = file.stat().st_size
    return Exported(path, size, float(error), relative)
