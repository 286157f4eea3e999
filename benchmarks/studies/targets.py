"""Programs for accelerators that are not here, and what can be read off them.

XLA compiles for an H100 or a TPU on a machine that has neither: it asks for a description of the
device only. `device` makes one, `compiled` a program for it, and `kernels` lists what that program
would run, with the bytes that each kernel reads and writes. Nothing runs, so there is no time; a
kernel's bytes are those of its operands and results, however often it reads them, and caches are
not known. It needs `make targets`, or

    pip install "jax-cuda12-plugin==<version of jax>" libtpu
"""

import collections
import math
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

# What `nvidia-smi` and the data sheet say of an H100 SXM, in the words of XLA's GpuTargetConfig.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPUS = {
    "v5e": "v5e:2x2",
    "v6e": "v6e:2x2",
    "v5p": "v5p:2x2x1",
}  # the smallest of each that a host has
NAMES = ("h100", *TPUS)

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4} | {
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
# They start nothing, or (on TPUs) move an array into the fast memory ahead of who reads it.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
} | {f"{kind}-{end}" for kind in ("copy", "slice", "async") for end in ("start", "update", "done")}
# Through these a kernel still reads only what a slice after them asks for.
PASSING = {"bitcast", "convert", "reshape", "transpose", "copy"}


class Kernel(NamedTuple):
    name: str
    kind: str  # what XLA calls it: fusion, custom-call, ...
    read: int  # bytes
    written: int  # bytes


class Instruction(NamedTuple):
    name: str
    result: str  # its type
    opcode: str
    operands: list[str]
    line: str


def device(name: str) -> Any:
    """A description of one device of that kind, to compile for. Raises as `devices`."""
    return devices(name, 1)[0]


def devices(name: str, number: int) -> Any:
    """So many devices of that kind on one host; of TPUs at most four.

    Raises:
      ValueError: no such name.
      ImportError: what compiles for it is not installed.
    """
    from jax.experimental import topologies

    if name not in NAMES:
        raise ValueError(f"targets: {name!r}, expected one of: {', '.join(NAMES)}.")
    module = "jax_plugins.xla_cuda12" if name == "h100" else "libtpu"
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(
            f"targets: no compiler for {name!r} ({module} cannot be imported); run `make targets`, "
            f"or {__doc__.strip().splitlines()[-1].strip()}"
        ) from error
    # There is no driver of it to be asked.
    jax.config.update("jax_platforms", "cpu")
    if name == "h100":
        those = {"target_config": H100, "topology": f"1x1x{number}"}
        return topologies.get_topology_desc("", "cuda", **those).devices
    # This machine is no host of TPUs: it is not to be asked which it has, nor need one process wait
    # for another's.
    for key, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        os.environ.setdefault(key, value)
    return topologies.get_topology_desc(TPUS[name], "tpu").devices[:number]


def compiled(f: Any, arguments: Any, device: Any) -> Any:
    """`jax.jit(f)` for that device and arguments of these shapes and dtypes."""
    traced = jax.jit(f).trace(*placed(arguments, device))
    return traced.lower(lowering_platforms=(platform(device),)).compile()


def placed(arguments: Any, device: Any) -> Any:
    """Shapes and dtypes of arrays on that device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )


def platform(device: Any) -> str:
    """The platform as JAX's lowering names it."""
    return "cuda" if device.platform == "gpu" else device.platform


def size(result: str) -> int:
    """Bytes of a type as HLO writes it, tuples summed."""
    return sum(
        BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    )


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry, instructions of each computation) of an HLO module."""
    found: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif body := re.match(r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            result, opcode, rest = body[2], body[3], body[4]
            operands = re.findall(r"%[\w.\-]+", rest[: _closing(rest)])
            found[name].append(Instruction(body[1], result, opcode, operands, line))
    return entry, found


def _closing(rest: str) -> int:
    """Where the parenthesis closes that opened before `rest`."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at
    return len(rest)


def kernels(program: Any) -> list[Kernel]:
    """What a compiled program starts, one after the other, with the bytes that each moves.

    An operand that a fusion takes a slice of, and nothing else, counts as much as the slice. Of a
    conditional's branches the one that moves least is listed: ours, on TPUs, look whether a mean
    is far from 0, and go on if none is.

    Raises:
      ValueError: there is a loop, whose body runs an unknown number of times.
    """
    entry, found = computations(program.as_text())
    return _listed(found[entry], found)


def _listed(body: list[Instruction], found: dict[str, list[Instruction]]) -> list[Kernel]:
    types = {i.name: i.result for i in body}
    listed = []
    for instruction in body:
        if instruction.opcode in ("while", "call"):
            raise ValueError(
                f"targets: the program has a {instruction.opcode}: {instruction.name}."
            )
        if instruction.opcode in FREE:
            continue
        if instruction.opcode == "conditional":
            named = instruction.line.split("computation", 1)[1].split(", metadata")[0]
            of = [_listed(found[name], found) for name in re.findall(r"%[\w.\-]+", named)]
            listed += min(of, key=moved)
            continue
        called = re.search(r"calls=(%[\w.\-]+)", instruction.line)
        read = [size(types[name]) for name in instruction.operands]
        if called:
            sliced = _sliced(found[called[1]])
            read = [sliced.get(i, whole) for i, whole in enumerate(read)]
        listed.append(
            Kernel(instruction.name, instruction.opcode, sum(read), size(instruction.result))
        )
    return listed


def _sliced(body: list[Instruction]) -> dict[int, int]:
    """Bytes read of those parameters of a fusion that only slices read, by parameter number."""
    users = collections.defaultdict(list)
    for instruction in body:
        for operand in instruction.operands:
            users[operand].append(instruction)

    def read(name: str, width: int) -> float:
        total = 0.0
        for user in users[name]:
            if user.opcode in ("slice", "dynamic-slice") and user.operands[0] == name:
                elements = size(user.result) / BYTES[user.result.split("[")[0]]
                total += elements * width
            elif user.opcode in PASSING:
                total += read(user.name, width)
            else:
                return math.inf
        return total

    of = {}
    for instruction in body:
        if instruction.opcode == "parameter" and "[" in instruction.result:
            number = int(re.search(r"parameter\((\d+)\)", instruction.line)[1])
            width = BYTES.get(instruction.result.split("[")[0], 0)
            if (bytes_ := read(instruction.name, width)) < size(instruction.result):
                of[number] = int(bytes_)
    return of


def moved(listed: Iterable[Kernel]) -> int:
    """Bytes read and written by all of them."""
    return sum(kernel.read + kernel.written for kernel in listed)


def cycles(program: Any) -> int:
    """What XLA's TPU compiler expects the kernels to take; 0 for other devices."""
    entry = program.as_text().partition("\nENTRY ")[2]
    known = map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))
    return sum(c for c in known if c < 1 << 62)  # the largest integer stands for "unknown"
