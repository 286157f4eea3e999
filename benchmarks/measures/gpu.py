"""The first minutes on a GPU, most valuable first: `python -m benchmarks gpu`.

Each result is one line of JSON on standard output, as it comes, and the lines so far are in
`results/<device>_<date>.jsonl`: a run that is cut short tells what it has. The parts are

1. a ResNet-50 training step in bfloat16: Flax's norm, ours, ours with activation and residual, and
   no norm, in turns;
2. the sums and the applies alone, in GB/s of what they must read and write;
3. torch's ResNet-50 (channels_last, autocast) where torch and torchvision are importable;
4. the step in float32;
5. `examples/cifar10/speedrun.py` over ten seeds, where `--data-dir` names a folder with CIFAR-10.

A part begins only where the time that is left is enough for it; a line says which parts do not.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.measures import step
from benchmarks.reporting import command, report, results
from benchmarks.subjects import network, peers
from jaxbn import Params
from jaxbn._op.axes import Axes
from jaxbn._op.moments import mean_and_var
from jaxbn._op.normalize import normalize
from jaxbn._op.tangent import affine, summed

NORMS = {"Flax linen": peers.linen, "jaxbn": peers.ours, peers.FUSED: peers.fused, step.NONE: None}
SHAPES = ((64, 56, 56, 64), (64, 56, 56, 256), (64, 7, 7, 2048))
# GB/s of the memory, by the maker's data sheets; of a GPU that is not here no share is given.
PEAKS = {"H100 PCIe": 2039, "H100 NVL": 3938, "H100": 3352, "H200": 4800}
SPEEDRUN = pathlib.Path(__file__).parents[2] / "examples" / "cifar10" / "speedrun.py"


class Run:
    """How much time is left, where lines go, and how much of everything is measured."""

    def __init__(self, tiny: bool, budget: float, folder: pathlib.Path | None) -> None:
        self.tiny, self.budget, self.begun = tiny, budget, time.monotonic()
        self.environment = report.environment()
        self.path = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"{results.stem(self.environment)}.jsonl"
        self.lines: list[str] = []

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begun)

    def say(self, **values: Any) -> None:
        self.lines.append(json.dumps({"s": round(time.monotonic() - self.begun, 1), **values}))
        print(self.lines[-1], flush=True)
        if self.path is not None:
            report.replace(self.path, "\n".join(self.lines) + "\n")

    def turns(self, functions: dict[str, timing.Timed], seconds: float) -> dict[str, Any]:
        rounds = timing.ROUNDS["tiny" if self.tiny else "usual"]
        return timing.measure(functions, rounds, seconds)


class Part(NamedTuple):
    name: str
    seconds: float  # that must be left for it to begin
    run: Callable[[], None]


def bandwidth(kind: str) -> int | None:
    """Peak GB/s of that device's memory, None where it is not known."""
    return next((value for name, value in PEAKS.items() if name in kind), None)


def steps(run: Run, dtype: Any, batch: int, seconds: float) -> None:
    """Milliseconds, images a second and peak memory of a training step."""
    task = network.Task("ResNet-50", step.R50, True, 64, batch, 224)
    if run.tiny:
        task = network.Task("ResNet", (1,), False, 4, 4, 8)
    with concurrent.futures.ThreadPoolExecutor(len(NORMS)) as pool:  # compiled side by side
        compiling = {n: pool.submit(step.compile_step, task, f, dtype) for n, f in NORMS.items()}
    functions = {}
    named = {"network": str(task), "dtype": jnp.dtype(dtype).name}
    for name, made in compiling.items():
        compiled, arguments = made.result()
        functions[name] = timing.queued(compiled, *arguments)
        memory = compiled.memory_analysis().temp_size_in_bytes
        sizes = {"peak_MB": step.peak(compiled) / 1e6, "temporaries_MB": memory / 1e6}
        run.say(what="compiled step", **named, norm=name, **sizes)
    measured = run.turns(functions, seconds)
    flax = measured["Flax linen"]
    for name, times in measured.items():
        told(run, times, of=flax, images=task.batch, what="step", **named, norm=name)


def told(run: Run, times: Any, of: Any = None, images: int = 0, **named: Any) -> None:
    """One line for what `timing.measure` gives of one function."""
    if isinstance(times, str):
        run.say(**named, failed=times)
        return
    values = {"ms": times.median, "spread_ms": times.spread, "rounds": times.rounds}
    if images:
        values["images_per_s"] = 1e3 * images / times.median
    if isinstance(of, timing.Times):
        values["of_flax"] = times.median / of.median
    run.say(**named, **values)


def parts_of_the_op(run: Run, dtype: Any, shape: tuple[int, ...], seconds: float) -> None:
    """The four passes over x alone, each by the op's own code; and plain sums beside them."""
    axes = Axes((len(shape) - 1,), tuple(range(len(shape) - 1)))
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(2))
    c = jnp.asarray(rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32))
    n = jnp.float32(x.size // shape[-1])

    def plain_sums(x):
        wide = x.astype(jnp.float32)
        return wide.sum(axes.reduced), (wide * wide).sum(axes.reduced)

    def forward_sums(x):
        return mean_and_var(x, n, None, None, axes=axes)

    def apply(x):
        return normalize(x, c, c, Params(c, c), axes, x.dtype)

    def static(relu):
        return {"axes": axes, "dtype": x.dtype, "valid": False, "relu": relu, "held": relu}

    def backward_sums(dy, x, relu):
        bias = c if relu else None
        return summed(dy, c, x, c, None, bias, None, **static(relu))[1:]

    def backward_apply(dy, x, relu):
        bias = c if relu else None
        return affine(dy.astype(jnp.float32), c, c, None, c, x, c, None, bias, None, **static(relu))

    one = functools.partial
    passes = {  # and how many arrays of x's size each must read and write
        "sums of x and x², plain": (plain_sums, (x,), 1),
        "mean and var of x": (forward_sums, (x,), 1),
        "y": (apply, (x,), 2),
        "sums of backward": (one(backward_sums, relu=False), (dy, x), 2),
        "sums of backward behind relu": (one(backward_sums, relu=True), (dy, x), 2),
        "dx": (one(backward_apply, relu=False), (dy, x), 3),
        "dx behind relu": (one(backward_apply, relu=True), (dy, x), 3),
    }
    functions = {
        name: timing.timed(f, *arguments, size=x.nbytes)
        for name, (f, arguments, _) in passes.items()
    }
    peak = bandwidth(jax.devices()[0].device_kind)
    named = {"shape": list(shape), "dtype": jnp.dtype(dtype).name}
    for name, times in run.turns(functions, seconds).items():
        if isinstance(times, str):
            run.say(what="pass", **named, name=name, failed=times)
            continue
        rate = passes[name][2] * x.nbytes / times.median / 1e6
        share = {} if peak is None else {"of_peak": rate / peak}
        run.say(what="pass", **named, name=name, ms=times.median, GB_per_s=rate, **share)


def torchs(run: Run, batch: int, seconds: float) -> None:
    """A step of torch, eager: channels_last, and autocast to bfloat16."""
    try:
        import torch
        import torchvision
    except ImportError as error:
        run.say(what="torch", failed=f"not importable: {error.name}")
        return
    if not torch.cuda.is_available():
        run.say(what="torch", failed="torch sees no GPU")
        return
    net = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    label = torch.zeros(batch, dtype=torch.long, device="cuda")

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x), label)
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    times = run.turns({"torch": timing.Timed(call)}, seconds)["torch"]
    named = {"network": f"ResNet-50, {batch} x 224²", "dtype": "bfloat16", "norm": "torch"}
    told(run, times, images=batch, what="step", **named)
    run.say(what="torch", peak_MB=torch.cuda.max_memory_allocated() / 1e6)


def speedrun(run: Run, folder: pathlib.Path | None) -> None:
    """Ten seeds of the fast road to 94 %, or as many as there is time for."""
    options = ["--data-dir", str(folder)]
    if run.tiny:
        options = ["--data", "digits", "--epochs", "0.2", "--batch", "64", "--width", "0.05"]
        options += ["--seeds", "1"]
    elif folder is None:
        run.say(what="speedrun", skipped="no --data-dir; write --data-dir FOLDER with CIFAR-10")
        return
    with tempfile.TemporaryDirectory() as made_in:
        out = pathlib.Path(made_in) / "speedrun.json"
        command = [sys.executable, str(SPEEDRUN), *options, "--out", str(out)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=run.left())
        except subprocess.TimeoutExpired:
            run.say(what="speedrun", failed=f"not done after {run.budget:.0f} s in all")
            return
        except subprocess.CalledProcessError as error:
            last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
            run.say(what="speedrun", failed=ascii(last[0] if last else error.returncode))
            return
        made = json.loads(out.read_text())
    scores = [100 * one["accuracy"] for one in made["runs"]]
    seconds = [one["seconds"] for one in made["runs"]]
    sd = {} if len(scores) == 1 else {"accuracy_sd": float(np.std(scores, ddof=1))}
    mean = {"accuracy": float(np.mean(scores)), "seconds": float(np.mean(seconds))}
    run.say(what="speedrun", data=made["data"], seeds=len(scores), **mean, **sd)


def plan(run: Run, folder: pathlib.Path | None) -> list[Part]:
    short = 0.1 if run.tiny else 1.0

    def op() -> None:
        for shape in [(4, 8, 8, 16)] if run.tiny else SHAPES:
            parts_of_the_op(run, jnp.bfloat16, shape, 4 * short)

    return [
        Part("step, bfloat16", 120, lambda: steps(run, jnp.bfloat16, 128, 25 * short)),
        Part("passes of the op", 40, op),
        Part("torch", 40, lambda: torchs(run, 128, 15 * short)),
        Part("step, float32", 100, lambda: steps(run, jnp.float32, 64, 15 * short)),
        Part("speedrun", 60, lambda: speedrun(run, folder)),
    ]


def main(arguments: list[str]) -> int:
    parser = command.parser("benchmarks gpu", __doc__.split("\n\n")[0])
    parser.add_argument(
        "--tiny", action="store_true", help="only to see that it runs, on a CPU too"
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds in all (450)")
    parser.add_argument("--data-dir", type=pathlib.Path, help="CIFAR-10's binary version")
    results.add_option(parser)
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # speedrun needs its share
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform != "gpu" and not options.tiny:
        parser.error(
            f"the first device is {kind!r} ({devices[0].platform}), expected a GPU; run it on a "
            f"machine with one and pip install 'jax[cuda12]', or write --tiny to see that it runs"
        )
    run = Run(options.tiny, options.budget, results.folder(options.results, options.tiny))
    known = bandwidth(kind)
    peak = known or f"unknown for {kind!r}, so no share of it is given"
    run.say(what="run", **run.environment, devices=len(devices), peak_GB_per_s=peak)
    for part in plan(run, options.data_dir):
        if run.left() < part.seconds:
            run.say(skipped=part.name, left_s=round(run.left()), needs_s=part.seconds)
            continue
        try:
            part.run()
        except Exception as error:  # the parts after it are worth having
            run.say(what=part.name, failed=f"{type(error).__name__}: {str(error)[:300]}")
    run.say(what="end", left_s=round(run.left()))
    if run.path is not None:
        print(f"written   {run.path}", file=sys.stderr)
    return 0
