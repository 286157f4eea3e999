# Checkpoints by orbax, named by the steps that were done: each is written beside its final place,
# with the checksums of its files, and renamed when complete. A save that was killed leaves only a
# temporary folder, which the next run clears away. The checksums are looked at before orbax is: of
# a flipped bit it says nothing, of other damage several pages.

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import hosts
import jax
import numpy as np
import orbax.checkpoint as ocp
import stop
from download import DataError

SAVING = ".saving"  # behind the name of one that is not complete
SUMS = "sha256.json"  # in each: file → checksum
TOTALS = "totals"  # beside the names of the state's arrays


class CheckpointError(DataError):
    """No checkpoint to go on from, and the line that says why."""


class SaveError(Exception):
    """A checkpoint that could not be written, and the line that says why."""


class Checkpoints:
    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self.keep = folder.absolute(), keep
        self.files = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def steps(self) -> list[int]:
        """Of all complete checkpoints, the newest first."""
        names = [path.name for path in self.folder.glob("*")]
        return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))[::-1]

    def save(self, steps: int, state, totals: np.ndarray) -> None:
        """
        The state after so many steps, and `totals` [2] float64: loss and accuracy summed over the
        steps of the epoch that is not at its end. Ctrl-C waits until all is written.
        """
        arrays, final = named(state) | {TOTALS: totals}, self.folder / str(steps)
        with stop.interrupts_wait():
            try:
                with silent():
                    saving = final.with_name(final.name + SAVING)
                    self.files.save(saving, args=ocp.args.StandardSave(arrays))
                if jax.process_index() == 0:
                    (saving / SUMS).write_text(json.dumps(sums(saving)))
                    saving.rename(final)
                if self.keep:
                    self.remove(self.steps()[self.keep :])
            except Exception as error:
                self.clear()  # what was written so far: the disk may be full
                raise SaveError(f"{final}: cannot be saved: {reason(error)}") from None

    def sound(self, steps: int) -> bool:
        """Whether the files of this checkpoint are those that were saved."""
        place = self.folder / str(steps)
        try:
            return json.loads((place / SUMS).read_text()) == sums(place)
        except (OSError, ValueError, RecursionError):
            return False

    def restore(self, steps: int, state):
        """State and totals after so many steps, laid over the devices as `state` is."""
        place, target = self.folder / str(steps), named(state) | {TOTALS: np.zeros(2)}
        try:
            with silent():
                saved = self.files.restore(place, args=ocp.args.StandardRestore(target))
        except Exception:  # the files are sound: orbax finds other names, or other shapes
            raise CheckpointError(f"{place}: not the state of this network") from None
        leaves = [saved[name] for name in named(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), saved[TOTALS]

    def newest(self, state):
        """
        (steps, state, totals, damaged): the newest sound checkpoint, and the steps of those after
        it. With no checkpoint at all it is 0 and the state given.
        """
        damaged = []
        for steps in self.steps():
            if hosts.all_of_them(self.sound(steps)):
                return (steps, *self.restore(steps, state), damaged)
            damaged.append(steps)
        if damaged:
            raise CheckpointError(f"{self.folder}: all checkpoints are damaged: {damaged}")
        return 0, state, np.zeros(2), []

    def remove(self, several) -> None:
        """Checkpoints that nobody wants; each by its name first, in case this is killed."""
        if jax.process_index() == 0:
            for steps in several:
                (self.folder / str(steps)).rename(self.folder / f"{steps}{SAVING}")
            self.clear()

    def clear(self) -> None:
        """What saves left that did not come to their end."""
        if jax.process_index() == 0:
            for left in self.folder.glob(f"*{SAVING}*"):
                shutil.rmtree(left, ignore_errors=True)


def last_checkpoint(run: Path, init, say=print):
    """The folder and the state of a run's newest sound checkpoint; `init()` is such a state."""
    saved = Checkpoints(run / "checkpoints")
    if not saved.steps():
        raise CheckpointError(f"{run} has no complete checkpoint")
    steps, state, _, damaged = saved.newest(init())
    for other in damaged:
        say(f"{saved.folder}/{other} is damaged; taking {steps}")
    return saved.folder / str(steps), state


def last_state(run: Path, init, say=print):
    """The state alone, for those who only read it."""
    return last_checkpoint(run, init, say)[1]


def named(state) -> dict:
    """Path → array, so that linen's and nnx's states are stored alike, and readable."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def sums(folder: Path) -> dict[str, str]:
    """File → SHA-256, of all that are in the folder but SUMS itself."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / SUMS:
            with open(path, "rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return found


@contextmanager
def silent():
    """Without what orbax logs of an error, which is told by us, in one line."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def reason(error: Exception) -> str:
    """What an error of Python's or TensorStore's says, in a few words."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]
