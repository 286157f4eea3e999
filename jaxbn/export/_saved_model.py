"""SavedModel: TensorFlow's folder, with the function as StableHLO inside."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._files import check_is_path, check_new_folder
from jaxbn._folding.program import trace
from jaxbn._misuse import takes
from jaxbn._text import first_line, printable
from jaxbn.export._checked_file import (
    TO_A_FILE,
    Case,
    Exported,
    arrays_of,
    example_call,
    inference_inputs,
    written,
)
from jaxbn.export._refusal import exported_alone, refusal
from jaxbn.export._signature import (
    by_name,
    examples_of,
    flat_args,
    names_of,
    shapes_of,
    untraceable,
)
from jaxbn.export._stablehlo import PLATFORMS

SIGNATURE = "serving_default"
XLA = "tensorflow.compiler.tf2xla.python.xla"  # as jax2tf calls StableHLO
STABLEHLO = "1.10.0"  # what is written: TensorFlow 2.21 reads up to 1.13, jax 0.12 writes 1.18


@takes(TO_A_FILE, example_call("saved_model"))
def saved_model(
    fn: Callable[..., Any],
    x: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    sizes: str | Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes `fn` as a SavedModel of TensorFlow's, for any batch size.

    For programs and servers that load SavedModels: TensorFlow itself, TensorFlow Serving. The
    function is inside as StableHLO, compiled for CPUs, GPUs and TPUs when it is loaded; its weights
    are constants. TensorFlow runs the signature "serving_default" on x, on one row and on another
    number of rows, and every result is compared with fn's before the folder takes its place.

    Args:
      fn: an inference function, batch first.
      x: an example batch: an array, a dict of arrays for `fn(x)`, or a tuple for `fn(*x)`.
      path: the folder, which must be new.
      inputs: names of the inputs, as of `onnx`.
      outputs: names of the results, as of `onnx`.
      sizes: the sizes of x, as of `onnx`. None: the batch is free.
      tolerance: the largest error over fn's largest value. None: 1e-4 for results in float32, 4e-3
        in float16, 3e-2 in bfloat16, 0 for integers.

    Raises:
      TypeError: fn is no function, or x no array.
      FileExistsError: there is something at path.
      ValueError: fn is in training mode, names or sizes do not fit, a result is not finite, or the
        folder differs from fn by more than tolerance. Nothing is written then.
      ModuleNotFoundError: tensorflow is missing.

    >>> from jaxbn import export
    >>> export.saved_model(lambda x: x, [1.0], ".")
    Traceback (most recent call last):
        ...
    FileExistsError: saved_model: . is there already; name a new folder.
    """
    check_new_folder("saved_model", path)
    args, leaves, structure = flat_args(x)
    leaves = inference_inputs("saved_model", fn, args, leaves, path)
    from jax.extend import mlir  # slow to import

    tf, xla = need("saved_model", "tensorflow"), need("saved_model", XLA)

    def flat(*leaves: Any) -> Any:
        return fn(*jax.tree.unflatten(structure, leaves))

    shapes = shapes_of("saved_model", leaves, sizes)
    try:
        results = jax.eval_shape(flat, *shapes)
    except Exception as error:
        raise untraceable("saved_model", leaves, shapes, error) from error
    whole = args if len(args) > 1 else args[0]
    ins = names_of("saved_model", "inputs", inputs, whole)
    outs = names_of("saved_model", "outputs", outputs, results)

    def free(shape: Sequence[Any]) -> list[int | None]:
        return [n if isinstance(n, int) else None for n in shape]

    specs = [
        tf.TensorSpec(free(s.shape), s.dtype, name) for s, name in zip(shapes, ins, strict=True)
    ]
    jitted = jax.jit(lambda *leaves: jax.tree.leaves(flat(*leaves)), keep_unused=True)
    try:
        program = jax.export.export(jitted, platforms=PLATFORMS)(*shapes)
        module = mlir.serialize_portable_artifact(program.mlir_module(), STABLEHLO)
    except Exception as error:
        ops = trace(flat, shapes, lambda eqn: True).ops
        attempt = partial(exported_alone, platforms=PLATFORMS)
        expected = (
            f"expected operations that StableHLO {STABLEHLO} has. Compute it outside fn or by "
            f"other operations."
        )
        raise refusal("saved_model", ops, attempt, error, expected) from error

    def serve(*arrays: Any) -> dict[str, Any]:
        results = xla.call_module(
            arrays,
            version=program.calling_convention_version,
            module=module,
            Sout=[free(v.shape) for v in program.out_avals],
            Tout=[tf.as_dtype(v.dtype) for v in program.out_avals],
            platforms=[name.upper() for name in PLATFORMS],
        )
        return dict(zip(outs, results, strict=True))

    def write(file: Path) -> None:
        holder = tf.Module()
        holder.serve = tf.function(serve, input_signature=specs, autograph=False)
        tf.saved_model.save(holder, os.fspath(file), signatures={SIGNATURE: holder.serve})

    def cases(file: Path) -> Iterator[Case]:
        call = load_saved_model(file)
        for example, _ in examples_of(leaves, shapes):
            expected = [np.asarray(y) for y in jax.tree.leaves(jax.jit(flat)(*example))]
            try:
                got = arrays_of(call(*example))
            except Exception as error:
                raise ValueError(
                    f"saved_model: TensorFlow cannot run fn: {_reason(error.__cause__ or error)}; "
                    f"expected operations that TensorFlow's XLA has. Compute it outside fn, or "
                    f"write jaxbn.export.stablehlo, which takes all but calls into Python."
                ) from error
            yield Case(got, expected)

    return written("saved_model", path, write, cases, tolerance)


def load_saved_model(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Returns a SavedModel as a function of NumPy arrays; TensorFlow runs the folder.

    The function takes the inputs in the folder's order, or one dict of them by name. It returns the
    result; of several results, a dict by name in the folder's order. A SavedModel is a program of
    TensorFlow's, which may read and write files: load folders of your own.

    Raises:
      FileNotFoundError: the folder does not exist, or holds no SavedModel.
      ValueError: TensorFlow cannot read the folder, or `saved_model` did not write the folder; when
        called, the inputs do not fit.
      ModuleNotFoundError: tensorflow is missing.

    >>> from jaxbn import export
    >>> export.load_saved_model("nothing")
    Traceback (most recent call last):
        ...
    FileNotFoundError: load_saved_model: no SavedModel in the folder nothing
    """
    check_is_path("load_saved_model", path)
    if not is_saved_model(path):
        raise FileNotFoundError(f"load_saved_model: no SavedModel in the folder {printable(path)}")
    tf = need("load_saved_model", "tensorflow")
    try:
        loaded = tf.saved_model.load(os.fspath(path))
        served, (written,) = loaded.signatures[SIGNATURE], loaded.serve.concrete_functions
        specs = {spec.name: spec for spec in written.structured_input_signature[0]}
        # TensorFlow sorts results by name; their order is that of the StableHLO inside.
        order = [result.op.inputs[0].value_index for result in written.outputs]
        names = zip(order, sorted(written.structured_outputs), strict=True)
        results = [name for _, name in sorted(names)]
    except Exception as error:
        raise ValueError(
            f"load_saved_model: TensorFlow cannot read {printable(path)}: {first_line(error)}; "
            f"expected a folder of jaxbn.export.saved_model."
        ) from error

    def call(*arrays: Any) -> Any:
        given, fits = by_name(specs, arrays)
        try:
            if not fits:
                raise ValueError("the inputs are others")
            made = served(**{name: tf.constant(v) for name, v in given.items()})
        except Exception as error:
            got = ", ".join(
                f"{printable(name)} {v.dtype} {list(v.shape)}" for name, v in given.items()
            )
            takes = ", ".join(
                f"{printable(name)} {v.dtype.name} [{', '.join(str(n or 'any') for n in v.shape)}]"
                for name, v in specs.items()
            )
            raise ValueError(
                f"load_saved_model: {printable(path)} cannot run on {got or 'nothing'}: "
                f"{_reason(error)}; expected {takes}."
            ) from error
        ordered = {name: made[name].numpy() for name in results}
        return ordered if len(results) > 1 else ordered[results[0]]

    return call


def _reason(error: BaseException) -> str:
    """What TensorFlow says of an error, without where in its graph the error was."""
    _, _, reason = str(error).partition("<stack traces unavailable>\n")
    return first_line(ValueError(reason)) if reason else first_line(error)


def is_saved_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with TensorFlow's file in the folder."""
    return Path(path, "saved_model.pb").is_file()
