# How a run is asked to stop. SIGTERM is how machines are taken away: the step ends, its state is
# saved. Ctrl-C is a person who waits: it stops at once, but never in the middle of a save.

import signal
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Stopped(BaseException):
    """Training has ended as it was asked to. `steps` were done, and are saved."""

    def __init__(self, steps: int):
        self.steps = steps


class Asked:
    """Within it a SIGTERM is noted, and does nothing else."""

    def __init__(self):
        self.came, self.looks = False, 0

    def __enter__(self):
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *_):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self.before)

    def note(self, *_):
        self.came = True

    def now(self) -> bool:
        """
        Whether to stop before the next step. With many processes JAX hears the SIGTERM, of any of
        them, and answers all at the same step: each must ask before each.
        """
        self.looks += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self.looks)
        return self.came


@contextmanager
def interrupts_wait():
    """A Ctrl-C that comes within it is raised at its end."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
