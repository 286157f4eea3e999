"""How time is taken: page faults and the allocator kept out on CPU, the device's time elsewhere.

On CPU a fresh array of 50 MB costs more in page faults than the arithmetic on it, and an
allocator that returns memory to the system makes every array a fresh one. So each benchmark runs
in a process that is started with ENVIRONMENT: nothing is mapped or trimmed for one array alone,
all threads share one arena. `prefault` then touches as much of it as the arrays to come need. The
page faults that are left during the timed calls are counted and printed. torch's threads sleep
while they wait, for spinning ones would slow down whatever is measured next.

On an accelerator the time is that of many calls in one dispatch (`repeated`, and a CUDA graph
for torch), so that Python, dispatch and launches are not in it. No GPU was at hand when this was
written: what the loop computes is tested on CPU, the CUDA graph has not been run.
"""

import collections
import functools
import math
import os
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.subjects import peers

ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "passive",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch needs its share of a GPU
    "KERAS_BACKEND": "jax",
}
ROUNDS = {"tiny": 2, "usual": 25, "full": 25}
FEWEST = 7  # rounds, however long they take
WARM_UP = 2


class Times(NamedTuple):
    """Of one function, in ms."""

    median: float
    spread: float  # between the quartiles
    rounds: int
    faults: float = 0.0  # page faults, mean of the calls


class Timed(NamedTuple):
    call: Callable[[], Any]
    calls: int = 1  # of the function in question, in one `call`


def accelerated() -> bool:
    return jax.default_backend() != "cpu"


def free_bytes() -> int:
    """Memory that arrays may still take, of the device or of this machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = "SC_AVPHYS_PAGES" in os.sysconf_names  # not on macOS
    pages = os.sysconf("SC_AVPHYS_PAGES") if free else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def prefault(size: int) -> None:
    """Makes this many bytes of the process's heap resident; they stay, by ENVIRONMENT."""
    if not accelerated():
        np.ones(size, np.uint8)


def repeated(f, calls: int):
    """`f` called so often in one program; the last result. For accelerators.

    Each call's arguments wait behind a barrier for the result before, or the first call would be
    moved out of the loop and be the only one. XLA's GPU back end takes barriers away after it has
    scheduled everything, its CPU back end before: there this would measure nothing.
    """

    def loop(*arguments):
        def body(_, result):
            return f(*lax.optimization_barrier((arguments, result))[0])

        shapes = jax.eval_shape(f, *arguments)
        empty = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        return lax.fori_loop(0, calls, body, empty)

    return loop


def timed(f, *arguments, size: int) -> Timed:
    """`f(*arguments)` compiled, `size` being the bytes of its main argument."""
    if not accelerated():
        return Timed(functools.partial(jax.jit(f), *arguments))
    calls = enough(size)
    return Timed(functools.partial(jax.jit(repeated(f, calls)), *arguments), calls)


def enough(size: int) -> int:
    """Calls that take an accelerator 10 ms or so, at 8 passes over `size` bytes at 4 TB/s."""
    return max(10, min(500, math.ceil(0.01 * 4e12 / (8 * size))))


def queued(f, *arguments) -> Timed:
    """`f(*arguments)`, of a whole network: on an accelerator the host waits for every tenth."""
    calls = 10 if accelerated() else 1

    def call():
        for _ in range(calls):
            result = f(*arguments)
        return result

    return Timed(call, calls)


def graph(f, size: int) -> Timed:
    """The `f()` of torch as a CUDA graph of many calls, or as it is on CPU."""
    if not accelerated():
        return Timed(f)
    import torch

    calls = enough(size)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is chosen and allocated once must not be captured
            f()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(calls):
            f()

    def call():
        captured.replay()
        torch.cuda.synchronize()

    return Timed(call, calls)


def measure(functions: dict[str, Timed], rounds: int, seconds=6.0) -> dict[str, Times | str]:
    """Times of each, called in turn; the turn starts one further every round.

    Before each timed call is one of the same function that is not timed, so that each finds in
    cache what it left there itself. Without, it would find what its neighbour left, and libraries
    that share x would hand it to one another, the first in the row to all others.

    Ends after so many rounds, or after `seconds` if FEWEST are done. What fails in its first
    call has its error's name in the place of times, but ours, which raises.
    """
    measured: dict[str, Times | str] = {}
    times: dict[str, list[float]] = {}
    faults: dict[str, int] = collections.Counter()
    for name, function in functions.items():
        try:
            for _ in range(WARM_UP):
                jax.block_until_ready(function.call())
            times[name] = []
        except Exception as error:
            measured[name] = peers.failure(name, error)
    names = list(times)
    start_of_all = time.perf_counter()
    for i in range(rounds):
        if i >= FEWEST and time.perf_counter() - start_of_all > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            function = functions[name]
            jax.block_until_ready(function.call())
            before = page_faults()
            start = time.perf_counter()
            result = jax.block_until_ready(function.call())
            times[name].append(1e3 * (time.perf_counter() - start) / function.calls)
            faults[name] += page_faults() - before
            del result
    for name, ms in times.items():
        low, median, high = np.percentile(ms, (25, 50, 75))
        measured[name] = Times(median, high - low, len(ms), faults[name] / len(ms))
    return {name: measured[name] for name in functions}


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def note(measured: Iterable[Times | str]) -> str:
    """What was left of page faults."""
    faults = [times.faults for times in measured if isinstance(times, Times)] or [0.0]
    settings = (f"{k}={v}" for k, v in ENVIRONMENT.items() if k.startswith(("MALLOC", "OMP")))
    return (
        f"Page faults of a timed call: {np.median(faults):.0f} in the middle, {max(faults):.0f} at "
        f"most ({' '.join(settings)})."
    )
