"""StableHLO: a file that any XLA runs, at any batch size."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxbn._extras import need
from jaxbn._files import check_file
from jaxbn._folding.program import trace
from jaxbn._misuse import takes
from jaxbn._text import first_line, printable
from jaxbn.export._checked_file import (
    TO_A_FILE,
    TOLERANCES,
    Case,
    Exported,
    example_call,
    inference_inputs,
    written,
)
from jaxbn.export._refusal import exported_alone, refusal
from jaxbn.export._signature import call_with, flat_args, names_of, shapes_of

PLATFORMS = ("cpu", "cuda", "tpu")


@takes(TO_A_FILE, example_call("stablehlo"))
def stablehlo(
    fn: Callable[..., Any],
    x: Any,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float | None = None,
) -> Exported:
    """Writes `fn` as StableHLO, for any batch size. `load_stablehlo` reads the file.

    `fn` closes over its weights, so they become part of the file. Before the file takes its place,
    it is read again and compared with fn on x. An older jax may not be able to read a file that a
    newer jax wrote.

    Args:
      fn: an inference function, batch first.
      x: an example batch: an array, a dict of arrays for `fn(x)`, or a tuple for `fn(*x)`. The
        function that `load_stablehlo` returns is called as fn is.
      path: the file; an older file is replaced once the new one is complete.
      platforms: the platforms that can run the file. Only that of this machine is compared.
      tolerance: the largest error over fn's largest value; None for 1e-5 of float32, 4e-3 of
        float16, 3e-2 of bfloat16.

    Raises:
      TypeError: fn is no function, or x no array.
      ValueError: fn is in training mode, works at one size alone, calls into Python or returns no
        array, a result is not finite, or the file differs from fn by more than tolerance. Nothing
        is written then.
      ModuleNotFoundError: flatbuffers is missing.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from jaxbn import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export.stablehlo(lambda x: 2 * x, jnp.ones((4, 3)), f"{folder}/f.hlo")
    ...     export.load_stablehlo(done.path)(jnp.ones((1, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    args, leaves, structure = flat_args(x)
    leaves = inference_inputs("stablehlo", fn, args, leaves, path)
    args = jax.tree.unflatten(structure, leaves)
    shapes = jax.tree.unflatten(structure, shapes_of("stablehlo", leaves, None))
    try:
        program = jax.export.export(jax.jit(fn), platforms=platforms)(*shapes)
    except Exception as error:
        raise _refusal(fn, shapes, platforms, error) from error
    try:
        content = bytes(program.serialize())
    except Exception as error:
        raise ValueError(
            f"stablehlo: a file cannot hold x or the results of fn as they are: "
            f"{first_line(error)}; expected arrays in tuples, lists, and dicts by name; of a "
            f"NamedTuple write x._asdict()."
        ) from error
    names_of("stablehlo", "outputs", None, program.out_avals)

    def cases(path: Path) -> Iterator[Case]:
        here = jax.default_backend()
        if ("cuda" if here == "gpu" else here) in platforms:
            yield Case(jax.tree.leaves(load_stablehlo(path)(*args)), jax.tree.leaves(fn(*args)))

    return written(
        "stablehlo",
        path,
        lambda file: file.write_bytes(content),
        cases,
        tolerance,
        TOLERANCES | {"float32": 1e-5, "float64": 1e-5},
    )


def _refusal(
    fn: Any, shapes: Sequence[Any], platforms: Sequence[str], error: Exception
) -> ValueError:
    """The refusal of what cannot be traced at any batch size, or not be written to a file."""
    try:
        ops = trace(fn, shapes, lambda eqn: True).ops
    except Exception as reason:
        sizes = ", ".join(map(str, jax.tree.leaves(shapes)[0].shape))
        return ValueError(
            f"stablehlo: fn cannot be traced with sizes {sizes}: {first_line(reason)}; expected "
            f"operations that work at any batch size."
        )
    expected = (
        "expected operations without calls into Python on platforms that jax knows. Compute it "
        "outside fn."
    )
    attempt = partial(exported_alone, platforms=platforms)
    return refusal("stablehlo", ops, attempt, error, expected)


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., jax.Array]:
    """Reads a file of `stablehlo` and returns the function in it.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is no StableHLO of `jax.export`; when called, the arguments do not fit
        the file.
      ModuleNotFoundError: flatbuffers is missing.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxbn import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export.stablehlo(jnp.sin, jnp.zeros((1, 2)), f"{folder}/sin.hlo")
    ...     export.load_stablehlo(done.path)(jnp.zeros((3, 2))).shape
    (3, 2)
    """
    check_file("load_stablehlo", path, "StableHLO")
    need("load_stablehlo", "flatbuffers")
    content = Path(path).read_bytes()
    try:
        program = jax.export.deserialize(bytearray(content))
    except Exception as error:
        raise ValueError(
            f"load_stablehlo: {printable(path)} is no StableHLO of jax.export that jax "
            f"{jax.__version__} can read; expected a file of jaxbn.export.stablehlo, written by "
            f"this jax or an older one."
        ) from error

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            structure: Any = jax.tree.structure((args, kwargs))
            if structure != program.in_tree:
                raise ValueError("the arguments have another structure")
            return program.call(*args, **kwargs)
        except (TypeError, ValueError) as error:
            expected = jax.tree.unflatten(program.in_tree, program.in_avals)
            raise ValueError(
                f"load_stablehlo: {printable(path)} cannot run on {call_with(args, kwargs)}: "
                f"{first_line(error)}; expected {call_with(*expected)}."
            ) from error

    return call
