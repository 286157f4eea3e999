# Five networks by torchvision's names: into Flax, back, folded, exported. One table.
#
#     python examples/convert/zoo.py                # random weights, no network needed
#     python examples/convert/zoo.py --tiny         # the same networks, small
#
# Where torchvision and onnxscript are installed, the column "torch" is the time of torch's own ONNX
# file beside ours. --torchvision loads the weights into torchvision's networks, which refuse names
# and shapes that are not theirs, and compares with what torch computes. TFLite needs
# pip install 'jaxbn[tflite]'.

import importlib
import importlib.metadata
import importlib.util
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import numpy as np
import zoo_names
from command import Parser, between, one_line
from flax import nnx
from zoo_networks import ZOO, Linen, Reference

import jaxbn
from jaxbn import convert, export

HEADERS = ("network", "arrays", "linen", "nnx", "back", "folded", "norms left")
FILES = ("StableHLO", "kB", "ONNX", "kB", "int8", "kB", "TFLite", "kB")
TIMES = {"onnx": "ms: ONNX", "int8.onnx": "int8", "torch.onnx": "torch"}
VERSIONS = ("jax", "onnxruntime", "ai-edge-litert", "torch", "torchvision")


def state_dict(name, arguments, seed=0):
    """Random weights by torchvision's names, with statistics as after a training."""
    rng = np.random.default_rng(seed)

    def values(key, shape):
        leaf = key.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            return np.asarray(1000)
        if len(shape) > 1:  # He et al. 2015: the variance of the activations stays
            fan_in = np.prod(shape[1:])
            return rng.normal(size=shape) * np.sqrt(2 / fan_in)
        if leaf in ("running_var", "weight"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(size=shape) * 0.1

    names = getattr(zoo_names, "resnet" if name.startswith("resnet") else name)(**arguments)
    state = {key: values(key, shape) for key, shape in names}
    return {k: v.astype(np.float32 if v.ndim else np.int64) for k, v in state.items()}


def torchvisions(name):
    """A state_dict in torchvision's own network, and that network."""
    import torch
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).eval()
    known = state_dict(name, ZOO[name].arguments)
    model.load_state_dict({key: torch.from_numpy(v) for key, v in known.items()})  # names, shapes
    return known, model


def channels_first(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def torchs_export(name, x, path):
    """The network of torchvision as torch writes it: a file that takes channels first."""
    import torch

    _, model = torchvisions(name)
    example = torch.from_numpy(channels_first(x))
    torch.onnx.export(model, (example,), path, dynamo=True, external_data=False, verbose=False)


def milliseconds(name, folder, x, calls=15):
    """The cells of a network's ONNX files: the fastest call to the median, called in turns."""
    runs, times = {}, {}
    for kind in TIMES:
        if (path := Path(folder, f"{name}.{kind}")).exists():
            fed = channels_first(x) if kind == "torch.onnx" else x
            runs[kind], times[kind] = partial(export.session(path), fed), []
    for _ in range(calls):
        for kind, run in runs.items():
            start = time.perf_counter()
            run()
            times[kind].append(1e3 * (time.perf_counter() - start))
    spans = {kind: f"{min(ms):.1f}-{statistics.median(ms):.1f}" for kind, ms in times.items()}
    return [spans.get(kind, "-") for kind in TIMES]


def in_nnx(linen, x):
    """The network as an nnx module, by Flax's own bridge."""
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(linen, nnx.Rngs(0)), x)
    model.to_nnx__rngs = None  # nothing is random in inference
    return model


def error(y, reference):
    """The largest error over the largest value."""
    y, reference = np.float64(y), np.float64(reference)
    return np.abs(y - reference).max() / np.abs(reference).max()


def converted(name, x, *, tiny=False, torchvision=False):
    """A network's state_dict, its results in float64 (or by torch), and the network in Flax."""
    entry = ZOO[name]
    arguments = entry.tiny if tiny else entry.arguments
    if torchvision:
        import torch

        state, model = torchvisions(name)
        with torch.no_grad():
            reference = model(torch.from_numpy(channels_first(x))).numpy()
    else:
        state = state_dict(name, arguments)
        with jax.enable_x64(True):
            reference = jax.jit(partial(entry.net, Reference(state), **arguments))(np.float64(x))
    linen = Linen(entry.net, tuple(arguments.items()))
    like = jax.eval_shape(linen.init, jax.random.key(0), x)
    variables, report = convert.from_torch(state, like, momentum=0.1, eps=1e-5)
    return state, reference, linen, variables, report


def row(name, x, folder, *, formats=("stablehlo", "onnx", "int8", "tflite"), **options):
    """One network: its cells of the table, and what was refused, with the reason."""
    state, reference, linen, variables, report = converted(name, x, **options)
    y = jax.jit(linen.apply)(variables, x)
    model, _ = convert.linen_to_nnx(variables, nnx.eval_shape(lambda: in_nnx(linen, x)))
    again, _ = convert.to_torch(model, state)
    same = all(np.array_equal(again[key], state[key]) for key in state)

    cells = [name, len(report.moves), error(y, reference), error(nnx.jit(model)(x), reference)]
    cells.append("same bits" if same else "NOT the same")
    folded, folds = jaxbn.fold(lambda x: linen.apply(variables, x), x, tolerance=1e-4)
    cells += [error(folded(x), reference), sum(site.folded is False for site in folds.sites)]

    refused = {}
    kinds = ("stablehlo", "onnx", "int8.onnx", "tflite", "torch.onnx")
    path = {kind: Path(folder, f"{name}.{kind}") for kind in kinds}
    writers = {
        "stablehlo": lambda: export.stablehlo(folded, x, path["stablehlo"], platforms=["cpu"]),
        "onnx": lambda: export.onnx(folded, x, path["onnx"]),
        # Random weights bound nothing: the table shows the error.
        "int8": lambda: export.int8(path["onnx"], [x], path["int8.onnx"], tolerance=10),
        "tflite": lambda: export.tflite(folded, x, path["tflite"]),
    }
    needs = {"int8": path["onnx"].exists, "tflite": partial(installed, "litert_converter")}
    for kind, write in writers.items():
        if kind not in formats:
            continue
        if kind in needs and not needs[kind]():
            cells += ["-", "-"]
            continue
        try:
            done = write()
        except Exception as reason:
            refused[f"{name}, {kind}"] = str(reason).splitlines()[0]
            cells += ["refused", "-"]
        else:
            export.manifest(done, folded=folds)
            cells += [done.relative, f"{done.bytes / 1e3:,.0f}"]
    if "onnx" in formats and not options.get("tiny") and has_torchvision():
        torchs_export(name, x, path["torch.onnx"])
    return cells, refused


def installed(package):
    return importlib.util.find_spec(package) is not None


def has_torchvision():
    """Whether torch can write torchvision's networks. Builds of the two may not fit each other."""
    try:
        importlib.import_module("onnxscript")
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


def versions():
    """The date, and what the table was made with."""
    found = {d.name: d.version for d in importlib.metadata.distributions()}
    known = (f"{name} {found[name]}" for name in VERSIONS if name in found)
    return ", ".join([time.strftime("%Y-%m-%d"), *known])


def table(rows):
    """Rows of cells as lines with aligned columns."""
    texts = [[f"{c:.1e}" if isinstance(c, float) else str(c) for c in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for cells in texts:
        pairs = list(zip(cells, widths, strict=True))
        yield "  ".join([pairs[0][0].ljust(pairs[0][1]), *(c.rjust(w) for c, w in pairs[1:])])


def main(args):
    size = args.size or (32 if args.tiny else 64)
    x = np.random.default_rng(1).normal(size=(4, size, size, 3)).astype(np.float32)
    rows, refused = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            cells, reasons = row(name, x, folder, tiny=args.tiny, torchvision=args.torchvision)
            rows.append(cells)
            refused |= reasons
            print(f"{name}: done", flush=True)
        for name, cells in zip(args.networks, rows, strict=True):
            cells += milliseconds(name, folder, x)
    print()
    print(*table([(*HEADERS, *FILES, *TIMES.values()), *rows]), sep="\n")
    for what, reason in refused.items():
        print(f"{what}: {reason}")
    print(
        "\nErrors are those of the results, over the largest result: of linen, nnx and the folded "
        "network from the source\nin float64, of StableHLO, ONNX and TFLite from the folded "
        "network, of int8 from ONNX. All are on the same images;\nms is the fastest of some calls "
        f"with them, and the median, by onnxruntime. {versions()}."
    )


if __name__ == "__main__":
    parser = Parser(
        prog="zoo.py",
        description="Networks by torchvision's names, converted, folded and exported.",
        examples=[
            "python examples/convert/zoo.py",
            "python examples/convert/zoo.py --tiny --networks resnet50 densenet121",
            "python examples/convert/zoo.py --torchvision --size 224 --networks resnet50",
        ],
    )
    parser.add_argument("--tiny", action="store_true", help="small networks of the same kinds")
    parser.add_argument(
        "--torchvision", action="store_true", help="with torchvision's own networks"
    )
    parser.add_argument("--size", type=between(int, 32), help="pixels of an image's side (64)")
    parser.add_argument("--networks", nargs="+", choices=ZOO, default=list(ZOO), metavar="NAME")
    args = parser.parse_args()
    if args.tiny and args.torchvision:
        parser.error("--tiny has no networks of torchvision's")
    with one_line(parser):
        main(args)
