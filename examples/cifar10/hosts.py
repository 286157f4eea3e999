# Many processes, on one host or on many: how they meet, what they agree on, how they end.
#
# When one process dies JAX's coordination service aborts the others from deep within C++, past
# every `except`. So each process is two: a child, which trains, and its parent, which waits for
# the child to end and says in one line which process was lost, and what to do.

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib

LOST = 75  # the exit status that says: resume (EX_TEMPFAIL of sysexits.h)
CHILD = "JAXBN_CIFAR10_CHILD"  # in the environment of the child
RESUME = "Resume with the same command and --resume on every process"

# What the coordination service writes before it aborts, by jaxlib 0.10 and 0.12.
SILENT = re.compile(r"Task (\d+) heartbeat timeout|stopped sending heartbeats\):\n((?:\d+\n)+)")
LEADER = "the leader task was preempted/died"
FROZEN = re.compile(r"DEADLINE_EXCEEDED[^\n]*\n+RPC: \S*/Heartbeat")  # process 0 answers nobody
TWICE = re.compile(r"(\d+) unexpectedly tried to connect with a different incarnation")
ABSENT = re.compile(r"DEADLINE_EXCEEDED[^\n]*\n+RPC: \S*/RegisterTask")
# From here on stderr is held back: a traceback or a stack dump, perhaps of another's death.
DUMP = re.compile(r"Traceback|[WEF]\d{4} .*(coordination_|preemption_|client\.h)")


def options() -> argparse.ArgumentParser:
    def seconds(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is out of range, must be at least 1")
        return int(text)

    seconds.__name__ = "int"
    p = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add = p.add_argument_group("many processes, each with the same --name").add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, a port that is free there")
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which one this is, 0 to N-1")
    add("--cluster", action="store_true", help="in place of these three: SLURM, TPU pod, ... knows")
    add(
        "--timeout",
        type=seconds,
        default=60,
        help="seconds for all to meet, 5 more to end (60)",
    )
    add("--heartbeat", type=seconds, default=10, help="seconds of silence that mean a death (10)")
    return p


# --- the parent -------------------------------------------------------------------------------


def supervise(argv: list[str] | None = None) -> None:
    """Returns where there is training to be done; the parent of a child exits here instead."""
    try:
        args, _ = options().parse_known_args(argv)
    except argparse.ArgumentError:
        return  # options.py says what is wrong
    if not (args.coordinator or args.cluster):
        return
    if os.environ.pop(CHILD, None):
        threading.Thread(target=end_with_parent, daemon=True).start()
        return
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {CHILD: "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches the parent alone
    )

    def stop(signum, frame):
        child.kill()
        say(f"Stopped. {RESUME}")
        sys.exit(128 + signum)

    def pass_on(signum, frame):  # the child ends when all have saved: stop.py
        child.terminate()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, pass_on)

    held = []
    with child:
        for line in child.stderr:
            if held or DUMP.search(line):
                held.append(line)
            else:
                say(line, end="")
        status, dump = child.wait(), "".join(held)
    if status == 128 + signal.SIGTERM:  # as asked; what is held is said, without JAX's log of it
        say("".join(line for line in held if not DUMP.search(line)), end="")
        sys.exit(status)
    if status == -signal.SIGTERM:  # before training, when there was nothing to save
        say(f"Stopped. {RESUME}")
        sys.exit(128 + signal.SIGTERM)
    if twice := TWICE.search(dump):  # not LOST: started again like this, it would end like this
        say(
            f"train.py: error: --process-id {twice[1]}: two processes have it. Give each its own, "
            "end all, and start them again"
        )
        sys.exit(2)
    if ABSENT.search(dump):
        where = "" if args.cluster else f"all {args.num_processes} processes at {args.coordinator} "
        say(
            f"train.py: error: waited {args.timeout} s for {where or 'the cluster '}in vain: is "
            "process 0 reachable there, are all started, each with a --process-id of its own, is "
            "--num-processes the same everywhere?"
        )
        sys.exit(2)
    if lost := lost_processes(dump):
        one, which = len(lost) == 1, ", ".join(map(str, lost))
        silent = f"no heartbeat for {args.heartbeat} s"
        why = "its connection broke" if lost == [0] and LEADER in dump else silent
        say(f"{'Process' if one else 'Processes'} {which} {'was' if one else 'were'} lost ({why}).")
        say(RESUME)
        sys.exit(LOST)
    say(dump, end="")
    if status < 0:
        say(f"This process was ended by {signal.Signals(-status).name}. {RESUME}")
        sys.exit(LOST)
    sys.exit(status)


def lost_processes(dump: str) -> list[int]:
    """Whom the coordination service names in `dump`."""
    names = " ".join(one or several for one, several in SILENT.findall(dump)).split()
    leader = LEADER in dump or FROZEN.search(dump)
    return sorted({int(name) for name in names}) or ([0] if leader else [])


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


# --- the child --------------------------------------------------------------------------------


def end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever sent: this returns when the parent is no more
    os._exit(LOST)


def connect(args) -> None:
    """Meet the other processes, before JAX computes anything; ValueError if that cannot be."""
    three = (args.coordinator, args.num_processes, args.process_id)
    if args.cluster and three != (None, None, None):
        raise ValueError("--cluster: without --coordinator, --num-processes and --process-id")
    if args.cluster:
        where = {}
    elif three == (None, None, None):
        return
    elif None in three:
        raise ValueError("--coordinator, --num-processes and --process-id: give all three")
    else:
        where = {"coordinator_address": three[0], "num_processes": three[1], "process_id": three[2]}
        if not re.fullmatch(r".+:\d+", args.coordinator):
            raise ValueError(f"--coordinator {args.coordinator}: must be HOST:PORT")
        if not 0 <= args.process_id < args.num_processes:
            raise ValueError(
                f"--process-id {args.process_id}: --num-processes {args.num_processes} are "
                f"0 to {args.num_processes - 1}"
            )
        if args.process_id == 0:
            host, port = args.coordinator.rsplit(":", 1)
            try:  # a port that is taken would end JAX in a segmentation fault
                socket.create_server(("", int(port))).close()
            except (OSError, OverflowError):
                raise ValueError(f"--coordinator {host}:{port}: port not free here") from None
    if not args.name:
        raise ValueError("many processes: give the run a --name, the same in each")
    if args.data in ("auto", "cifar10", "cifar100") and not args.data_dir:
        raise ValueError("many processes: give the --data-dir of CIFAR, or other --data")

    import jax

    try:
        jax.distributed.initialize(
            **where, initialization_timeout=args.timeout, heartbeat_timeout_seconds=args.heartbeat
        )
    except (ValueError, RuntimeError) as error:
        what = "--cluster: is this one? JAX says" if args.cluster else "--coordinator: JAX says"
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from None


def agree(problem: str | None, terms: str) -> str | None:
    """What keeps the run from starting, here or elsewhere; `terms` must be the same everywhere."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return problem
    mine = np.array([problem is not None, zlib.crc32(terms.encode())], np.uint32)
    troubled, crc = process_allgather(mine).T  # [processes] each
    if problem is None and troubled.any():
        return f"process {troubled.argmax()} cannot start, and says why"
    if problem is None and (crc != crc[0]).any():
        return f"process {(crc != crc[0]).argmax()} has other options than process 0"
    return problem


def all_of_them(sound: bool) -> bool:
    """Whether `sound` is true in every process."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return sound
    return bool(process_allgather(np.array([sound])).all())


def give_up(heartbeat: int, why: str) -> None:
    """
    After an exception in training. If it comes from another's death, the coordination service
    ends us while we sleep, with that one's name; if it is our own, the others must miss us.
    """
    time.sleep(2 * heartbeat)
    say(why)
    os._exit(1)
