"""The commands of `python -m jaxbn`: each calls a tool of the package and prints the result.

The exit status is 0; 1 if there are findings, nothing was folded, or the fold is not exact enough;
2 if a file cannot be read or written, or the user's code fails.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxbn._cli import options
from jaxbn._cli.output import OutputError
from jaxbn._text import distinct, printable


class Format(NamedTuple):
    """A format of exported files, and the functions of `jaxbn.export` for it."""

    name: str
    write: str
    load: str
    int8: str | None = None


FORMATS = {  # by the suffix
    ".onnx": Format("ONNX", "onnx", "session", "int8"),
    ".stablehlo": Format("StableHLO", "stablehlo", "load_stablehlo"),
    ".tflite": Format("TFLite", "tflite", "load_tflite", "tflite_int8"),
    "": Format("a SavedModel", "saved_model", "load_saved_model"),
}
ARTIFACT = ".onnx, .stablehlo or .tflite"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. Wrong options raise SystemExit(2).

    Args:
      argv: the words after `python -m jaxbn`. None: the words this process was started with.

    >>> from jaxbn._cli import commands
    >>> try:
    ...     commands.main(["--version"])
    ... except SystemExit as end:
    ...     end.code
    jaxbn 0.2.0
    0
    """
    args = options.parse(argv)
    try:
        with _quiet():
            return COMMANDS[args.command](args)
    except OutputError:
        raise
    except (Exception, SystemExit) as error:
        if args.traceback:
            traceback.print_exc()
        from jaxbn.convert._matching import MisfitError

        if isinstance(error, SystemExit):
            error = ValueError(f"the model's code ended the program: SystemExit: {error}")
        # The error begins with the name of a function; the line printed begins with the command's.
        text = re.sub(r"^[a-z]\w*: ", "", str(error).strip()) or type(error).__name__
        lines = text.split("\n")
        if not isinstance(error, MisfitError):  # a MisfitError has a line for each array
            lines = lines[:1]
        print(f"{args.command}: " + "\n".join(map(printable, lines)), file=sys.stderr)
        return 2


def doctor(args: Namespace) -> int:
    """Prints what is wrong with the norm layers of a checkpoint. Status 1 if there are findings."""
    from jaxbn import health
    from jaxbn._checkpoints import norm_layers
    from jaxbn._checkpoints.read import read
    from jaxbn._cli import picture, terminal

    _on_the_cpu()
    found = norm_layers.norms_in(read(args.checkpoint))
    if not found:
        raise ValueError(
            f"{printable(args.checkpoint)} holds no batch norm layer, expected arrays mean and "
            f"var, or PyTorch's running_mean and running_var, beside each other."
        )
    _check_arrays(found)
    found = dict(zip(distinct(map(printable, found)), found.values(), strict=True))
    given = {"momentum": args.momentum, "epsilon": args.epsilon, "dtype": args.dtype}
    findings = health.check(found, **given)
    rows = health.summary(found, findings, epsilon=args.epsilon)
    source = printable(args.checkpoint)
    if args.plot:
        title = f"{source}: {terminal.verdict(findings)}"
        picture.plot(args.plot, title, found, findings)
    if args.json:
        print(terminal.as_json(source, rows, findings, momentum=args.momentum))
    else:
        terminal.show(source, rows, findings, momentum=args.momentum)
    return 1 if findings else 0


def convert(args: Namespace) -> int:
    """Writes a checkpoint in another format, or by the names and layouts of another library."""
    from jaxbn import convert as tool
    from jaxbn._checkpoints import contents, write
    from jaxbn._cli import users_model

    write.check_destination(Path(args.dest))
    if not args.model:
        _on_the_cpu()
    source = contents.read_model(args.source, args.part)
    report: Any = None
    new: Mapping[str, Any]
    if args.model:
        model, report = _loaded(source, users_model.network(args.model).model, args)
        new = contents.arrays(model)
    elif args.torch:
        new, report = tool.to_torch(source.variables(), rename=args.rename)
    elif args.like:
        like = contents.read_model(args.like)
        if like.kind == "torch":
            names = like.state_dict()
            new, report = tool.to_torch(
                source.variables(), names, rename=args.rename, keep=args.keep
            )
        else:
            new, report = _loaded(source, like.variables(), args)
            new = new if like.kind == "linen" else new["params"]
    else:
        new = source.tree
    write.save(args.dest, new)
    print(*[report] * (report is not None), f"wrote {printable(args.dest)}", sep="\n")
    return 0


def recalibrate(args: Namespace) -> int:
    """Computes running statistics again by the user's model, over the user's data."""
    import jaxbn
    from jaxbn._checkpoints import contents, write

    write.check_destination(Path(args.dest))
    apply, model, batches = _network(args)
    where = args.where or "*"
    model = jaxbn.recalibrate(apply, model, batches, where=where, limit=args.batches)
    write.save(args.dest, contents.arrays(model))
    print(f"wrote {printable(args.dest)}")
    return 0


def fold(args: Namespace) -> int:
    """Prints what can be folded and the error of each. Status 1 if nothing can, or not exactly."""
    from jaxbn._folding.fold import FoldError
    from jaxbn._folding.fold import fold as tool

    fn, x, _ = _function(args)
    try:
        report = tool(fn, x, tolerance=args.tolerance)[1]
    except FoldError as error:
        print(error.report, str(error).removeprefix("fold: "), sep="\n")
        return 1
    print(report)
    return 0 if report.folded else 1


def lint(args: Namespace) -> int:
    """Prints what is wrong with how a network is put together. Status 1 if there are findings."""
    import jax
    import jax.numpy as jnp

    from jaxbn import health
    from jaxbn._cli import terminal, users_model
    from jaxbn._inspection.layers import is_nnx

    _on_the_cpu()
    apply, model, batches = users_model.network(args.model)
    x = _first(batches, args)
    if not is_nnx(model):
        # Shapes will do. Ones and not zeros: a factor that is 0 is a finding.
        shapes = jax.tree.map(
            lambda v: jnp.ones(v.shape, v.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v,
            model,
        )
        findings = health.lint(functools.partial(apply, shapes), x, train=args.train)
    else:
        findings = health.lint(apply, model, x, train=args.train)
    if args.json:
        print(terminal.findings_as_json(args.model, findings))
    else:
        terminal.show_findings(args.model, findings)
    return int(bool(findings))


def export(args: Namespace) -> int:
    """Folds the norms of the user's model and writes a file, or a folder, to serve."""
    import jaxbn
    from jaxbn import export as tool

    dest = Path(args.dest)
    form = _format_of(dest, args.int8)
    fn, x, batches = _function(args)
    report = source = None
    if args.fold:
        fn, report = jaxbn.fold(fn, x)
        print(report)
    own = {} if args.tolerance is None else {"tolerance": args.tolerance}
    done: tool.Exported | tool.Quantized
    fn, example = _of_arguments(fn, x), _arguments(x)
    write: Any = getattr(tool, form.write)
    if args.int8 and form.int8:
        quantize: Any = getattr(tool, form.int8)
        with tempfile.TemporaryDirectory() as folder:
            source = write(fn, example, Path(folder, f"float{dest.suffix}"))
            done = quantize(source.path, map(_arguments, batches), dest, **own)
    else:
        done = write(fn, example, dest, **own)
    tool.manifest(done, folded=report, source=source, checkpoint=args.source)
    print(
        f"wrote {printable(dest)}: {done.bytes} bytes, largest error {done.relative:.1e} of the "
        f"largest value"
    )
    return 0


def compare(args: Namespace) -> int:
    """Compares two checkpoints or two exported files. Status 1 if a figure is beyond its bound."""
    from jaxbn._cli import comparison, users_model

    files = [_is_artifact(path) for path in (args.a, args.b)]
    if any(files) and not all(files):
        raise ValueError(
            "one of the two is an exported file and the other a checkpoint, expected two of a "
            "kind; write python -m jaxbn verify ARTIFACT --against CHECKPOINT"
        )
    rows: list[Any] = []
    outputs: list[Any] = []
    beyond: list[Any] = []
    if all(files):
        batches = None
        if args.model and not args.inputs:  # the files need no model; its first batch is at hand
            batches = users_model.network(args.model)[2]
        x: Any = _inputs(args, batches)
        fns: Any = [_artifact(path)[0] for path in (args.a, args.b)]
    else:
        fns, x, parts = _two_models(args)
        bounds = {"divergence": args.divergence, "weights": args.weights, "epsilon": args.epsilon}
        rows, beyond = comparison.layer_rows(*parts, **bounds)
    if fns:
        results = [fn(x) for fn in fns]
        outputs, more = comparison.results(*results, bound=args.bound, agree=args.agree)
        beyond += more
    if args.json:
        names = {"a": printable(args.a), "b": printable(args.b)}
        print(comparison.as_json(beyond, **names, layers=rows, outputs=outputs))
    else:
        comparison.show(f"{args.a} and {args.b}", rows, outputs, beyond)
    return 1 if beyond else 0


def verify(args: Namespace) -> int:
    """Compares an exported file with the model it was made of. Status 1 if it is another."""
    from jaxbn._cli import comparison
    from jaxbn.export._beside import checksum

    if not _is_artifact(args.artifact):
        raise ValueError(
            f"{printable(args.artifact)} is no exported file by its name, expected {ARTIFACT}, or "
            f"the folder of a SavedModel"
        )
    served, manifest = _artifact(args.artifact)
    apply, model, batches = _network(args)
    x = _inputs(args, batches)
    reference = _results(apply, model, x)
    bounds = {"bound": args.bound, "agree": args.agree}
    outputs, beyond = comparison.results(served(x), reference, **bounds)
    row = _first_row(x)
    expected = _results(apply, model, row)  # not the first of reference: a result may have no rows
    alone, more = comparison.results(served(row), expected, **bounds, what="a row alone")
    beyond += more
    made_of = manifest and manifest["checkpoint"]
    if made_of and made_of["sha256"] != checksum(args.source):
        beyond.append(comparison.Beyond("the manifest names another checkpoint"))
    if args.json:
        names = {"artifact": printable(args.artifact), "against": printable(args.source)}
        print(comparison.as_json(beyond, **names, manifest=manifest, outputs=[*outputs, *alone]))
    else:
        title = f"{args.artifact} against {args.source}"
        comparison.show(title, [], [*outputs, *alone], beyond)
        if manifest is None:
            print("no manifest beside the file: what it was made of is not checked")
    return 1 if beyond else 0


def serving(args: Namespace) -> int:
    """Prints what is wrong with a model as a server runs it. Status 1 if there are findings."""
    from jaxbn import health
    from jaxbn._cli import comparison, terminal

    apply, model, batches = _network(args)
    x = _inputs(args, batches)
    found = health.serving(functools.partial(_results, apply, model), x, tolerance=args.tolerance)
    source = printable(args.source)
    if args.json:
        print(comparison.as_json(found, checkpoint=source))
    else:
        print(f"{source}: {comparison.verdict(found)}", *terminal.plain(found), sep="\n")
    return 1 if found else 0


COMMANDS = {
    "doctor": doctor,
    "convert": convert,
    "recalibrate": recalibrate,
    "fold": fold,
    "lint": lint,
    "export": export,
    "compare": compare,
    "verify": verify,
    "serving": serving,
}


def _check_arrays(found: Mapping[str, Any]) -> None:
    """Raises unless each layer's arrays are numbers of one shape, and its count is a number."""
    import jax.numpy as jnp
    import numpy as np

    def numbers(v: Any, *kinds: Any) -> bool:
        return any(jnp.issubdtype(v.dtype, kind) for kind in kinds) and v.dtype.kind != "m"

    for name, (params, state) in found.items():
        like = "scale" if state.mean is None else "mean"
        arrays = {**params._asdict(), **state._asdict(), "count": None}
        shape = arrays[like].shape
        for field, v in arrays.items():
            if v is None:
                continue
            real = [] if field == "var" else [jnp.complexfloating]
            if not numbers(v, jnp.floating, jnp.integer, *real) or v.shape != shape:
                raise ValueError(
                    f"{field} of layer {name!r} has shape {v.shape} and dtype {v.dtype}, expected "
                    f"numbers of the {like}'s shape {shape}."
                )
            if not v.size:
                raise ValueError(
                    f"{field} of layer {name!r} has shape {shape}: it holds no number."
                )
        if (v := state.count) is None:
            continue
        if not numbers(v, jnp.floating, jnp.integer) or not v.size:
            raise ValueError(
                f"count of layer {name!r} has shape {v.shape} and dtype {v.dtype}, expected the "
                f"number of its updates."
            )
        wide = np.asarray(v, np.float64)
        if not (np.isfinite(wide) & (wide >= 0)).all():
            raise ValueError(
                f"count of layer {name!r} is {wide.min():g}, expected the number of its updates."
            )


def _network(args: Namespace) -> tuple[Any, Any, Any]:
    """The user's (apply, model, batches), with the checkpoint's arrays in the model."""
    from jaxbn._checkpoints.contents import read_model
    from jaxbn._cli import users_model

    source = read_model(args.source, args.part)
    apply, model, batches = users_model.network(args.model)
    return apply, _loaded(source, model, args)[0], batches


def _function(args: Namespace) -> tuple[Any, Any, Any]:
    """The user's model as a function of x; the first batch; all batches, the first included."""
    apply, model, batches = _network(args)
    some = itertools.islice(batches, args.batches)
    x = _first(some, args)
    return functools.partial(apply, model), x, itertools.chain([x], some)


def _first(batches: Iterable[Any], args: Namespace) -> Any:
    """The first batch of the user's model."""
    x = next(iter(batches), None)
    if x is None:
        raise ValueError(f"{args.model} gives no batches, expected at least one as the example.")
    return x


def _results(apply: Any, model: Any, x: Any) -> Any:
    """What the user's model makes of x."""
    from jaxbn._cli.users_model import called

    try:
        return apply(model, x)
    except Exception as error:
        raise ValueError(
            f"the model fails on the inputs: {called(error)}; expected inputs as the model takes "
            f"them, one array, a tuple or a dict by name"
        ) from error


def _inputs(args: Namespace, batches: Iterable[Any] | None = None) -> Any:
    """The batch in the file that --inputs names, or else the first batch of the user's model."""
    from jaxbn._checkpoints.inputs import read_inputs

    if args.inputs:
        return read_inputs(args.inputs)
    if batches is None:
        raise ValueError(
            "no inputs for two exported files to run on; write --inputs FILE.npz, or --model "
            "MODULE:FUNCTION for its first batch"
        )
    return _first(batches, args)


def _format_of(dest: Path, int8: bool) -> Format:
    """The format to export to. Raises if dest has the name of none, or cannot be written to."""
    from jaxbn._extras import need
    from jaxbn._files import check_new_folder, check_place
    from jaxbn.export._beside import manifest_beside
    from jaxbn.export._checked_file import PACKAGES

    form = FORMATS.get(dest.suffix)
    ends = f"{printable(dest)} ends in {printable(dest.suffix) or 'nothing'}"
    if form is None or (not dest.suffix and "." in dest.name):  # ".onnx", of an empty $NAME.onnx
        raise ValueError(
            f"{ends}, expected {ARTIFACT}, or a name without a dot for the folder of a SavedModel"
        )
    calls = form.write, form.int8 if int8 else form.write
    if calls[1] is None:
        raise ValueError(f"--int8 is for .onnx and .tflite, and {ends}")
    (check_place if dest.suffix else check_new_folder)("export", dest)
    check_place("export", manifest_beside(dest))
    for package in dict.fromkeys([*PACKAGES[calls[0]], *PACKAGES[calls[1]]]):
        need(f"{printable(dest)} as {form.name}", package)
    return form


def _arguments(x: Any) -> tuple[Any, ...]:
    """The arguments of an exported file for a batch: those in a tuple or a list, or one."""
    if not isinstance(x, list | tuple):
        return (x,)
    return (x._asdict(),) if hasattr(x, "_fields") else tuple(x)  # type: ignore[union-attr]


def _of_arguments(fn: Any, x: Any) -> Any:
    """fn, a function of a batch of x's kind, as a function of its `_arguments`."""
    if not isinstance(x, list | tuple):
        return fn
    kind = type(x)
    if hasattr(x, "_fields"):
        return lambda arrays: fn(kind(**arrays))
    return lambda *arrays: fn(kind(arrays))


def _first_row(x: Any) -> Any:
    """The first row of a batch; an input without rows, a scalar or a table, stays as it is."""
    import jax
    import numpy as np

    rows = next((np.shape(v)[:1] for v in jax.tree.leaves(x)), ())
    return jax.tree.map(lambda v: v[:1] if rows and np.shape(v)[:1] == rows else v, x)


def _two_models(args: Namespace) -> tuple[Any, Any, Any]:
    """Two checkpoints: their functions and x, if the user's model is named; norms and weights."""
    from jaxbn._checkpoints.contents import Contents, arrays, read_model
    from jaxbn._cli import comparison, users_model
    from jaxbn._inspection.layers import is_nnx

    sources = [read_model(path, args.part) for path in (args.a, args.b)]
    fns, x = [], None
    if args.model:
        apply, like, batches = users_model.network(args.model)
        models = [_loaded(source, like, args)[0] for source in sources]
        fns = [functools.partial(_results, apply, model) for model in models]
        x = _inputs(args, batches)
        kind: Any = "nnx" if is_nnx(like) else "linen"
        sources = [Contents(kind, arrays(model)) for model in models]
    elif args.inputs or args.agree is not None:
        raise ValueError(
            "--inputs and --agree are for results, which two checkpoints have by a model alone; "
            "write --model MODULE:FUNCTION"
        )
    else:
        _on_the_cpu()
    if sources[0].kind != sources[1].kind:
        raise ValueError(
            f"A has the names of {sources[0].kind} and B those of {sources[1].kind}, expected one "
            f"kind; write --model MODULE:FUNCTION, into which both are read"
        )
    parts = [comparison.parts(source) for source in sources]
    for norms, _ in parts:
        _check_arrays(norms)
    return fns, x, parts


def _is_artifact(path: str) -> bool:
    """Whether a path is that of an exported file, by its name, or a SavedModel's folder."""
    from jaxbn.export._saved_model import is_saved_model

    suffix = Path(path).suffix
    return (suffix != "" and suffix in FORMATS) or is_saved_model(path)


def _artifact(path: str) -> tuple[Any, Any]:
    """An exported file as a function, and its manifest, which must fit the file; None without."""
    from jaxbn import export
    from jaxbn.export._beside import manifest_beside

    manifest = export.read_manifest(path) if manifest_beside(Path(path)).exists() else None
    suffix = Path(path).suffix
    load: Any = getattr(export, FORMATS.get(suffix, FORMATS[""]).load)
    with _silent_compiler():
        fn = load(path)

    def run(x: Any) -> Any:
        with _silent_compiler():
            y: Any = fn(*_arguments(x))
        # Several results of a file stand in the order of the function's leaves, by any names.
        return list(y.values()) if suffix != ".stablehlo" and isinstance(y, Mapping) else y

    return run, manifest


def _loaded(source: Any, like: Any, args: Namespace) -> tuple[Any, Any]:
    """`users_model.load` with the options of the command line; a refusal names these options."""
    from jaxbn._cli import users_model
    from jaxbn.convert._matching import MisfitError

    given = {"rename": args.rename, "keep": args.keep, "epsilon": args.epsilon}
    try:
        return users_model.load(source, like, **given)
    except MisfitError as error:
        raise MisfitError(
            f"{error}\nHere: --rename A=B, --keep LAYER, --part PATH if the model is a part of the "
            f"checkpoint."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences logs and warnings of other libraries: they may quote the bytes of a file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _silent_compiler() -> Iterator[None]:
    """Drops what C++ prints on stderr: MLIR quotes the bytes of a damaged file."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _on_the_cpu() -> None:
    """Keeps JAX on the CPU: an accelerator's memory may belong to a run that trains there."""
    import jax

    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
