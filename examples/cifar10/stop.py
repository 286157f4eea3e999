# How a run is asked to stop. SIGTERM is how machines are taken away: the step ends, its state is
# saved. Ctrl-C is a person who waits: it stops at once, but never in the middle of a save.

import signal
from contextlib import ExitStack, contextmanager

import jax
from jax.experimental import multihost_utils


class Stopped(BaseException):
    """Training has ended as it was asked to. `steps` were done, and are saved."""

    def __init__(self, steps: int):
        self.steps = steps


@contextmanager
def handled(number: int, handler):
    """
    Within it the handler gets the signal, unless the signal is ignored: a shell starts `command &`
    so, lest a Ctrl-C for what runs in front end what runs behind.
    """
    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:
        signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class Asked:
    """
    Within it a SIGTERM is noted, and does nothing else. A Ctrl-C is raised, and raised again before
    the next step: Python drops what is raised in a callback of the garbage collector, as JAX has.
    """

    def __init__(self):
        self.came, self.interrupted, self.looks = False, False, 0
        self.signals = ExitStack()

    def __enter__(self):
        if jax.process_count() == 1:
            self.signals.enter_context(handled(signal.SIGTERM, self.note))
            self.signals.enter_context(handled(signal.SIGINT, self.interrupt))
        return self

    def __exit__(self, *_):
        self.signals.close()

    def note(self, *_):
        self.came = True

    def interrupt(self, *_):
        self.interrupted = True
        raise KeyboardInterrupt

    def now(self) -> bool:
        """
        Whether to stop before the next step. With many processes JAX hears the SIGTERM, of any of
        them, and answers all at the same step: each must ask before each.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        self.looks += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self.looks)
        return self.came


@contextmanager
def interrupts_wait():
    """A Ctrl-C that comes within it is raised at its end."""
    came = []
    with handled(signal.SIGINT, lambda *_: came.append(True)):
        yield
    if came:
        raise KeyboardInterrupt
