"""The writers of a training loop: when they write, in which process, and what if one fails."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import jax

from jaxbn.health._drift import Drift, LayerDrift
from jaxbn.watch import Record, channels, metrics
from jaxbn.writers._json_lines import JSONLines
from jaxbn.writers._prometheus import DRIFT, Prometheus
from jaxbn.writers._tensorboard import TensorBoard
from jaxbn.writers._writer import Writer, reason


class Log:
    """The writers of a training loop: what they write, when, and in which process.

    Process 0 writes; `due` is the same in all, as it must be where the watched step is a program
    of its own with collectives in it. A writer that fails in the middle of training is closed
    and dropped with a RuntimeWarning that names it, the step and the error, and training goes
    on; what it had written stays whole.

    Raises:
      ValueError: every is negative.

    >>> from jaxbn import writers
    >>> with writers.Log([], every=50) as log:
    ...     [step for step in range(200) if log.due(step)]
    [0, 50, 100, 150]
    """

    def __init__(self, writers: Sequence[Writer], every: int = 50):
        """`every=0`: never."""
        if every < 0:
            raise ValueError(
                f"Log: every={every!r}, expected a number of steps, or 0 for never; write every=50."
            )
        self.every = every
        self.writers = list(writers) if jax.process_index() == 0 else []

    def due(self, step: int) -> bool:
        """Whether this step is to be watched."""
        return self.every > 0 and step % self.every == 0

    def write(self, step: int, records: Mapping[str, Record] | Drift) -> None:
        """Bring the records of a watched step to the host and give their figures to the writers.

        Of a `jaxbn.health.Drift`, the verdict on served data, its layers' figures are written:
        `drift_alarm` (1 or 0), `drift_figure` and the others, no arrays.

        Raises:
          TypeError: records are something else.
          ValueError: there are none.
        """
        if isinstance(records, Drift):
            figures, arrays = {layer.layer: _verdict(layer) for layer in records.layers}, {}
        else:
            _check(records)
            if not self.writers:
                return
            on_host: dict[str, Record] = jax.device_get(dict(records))
            figures = metrics(on_host)
            arrays = {layer: channels(record) for layer, record in on_host.items()}
        self._each(f"at step {step}", lambda writer: writer.write(step, figures, arrays))

    def rewind(self, step: int) -> None:
        """Training goes on from this step: void what was written of it and of later ones."""
        self._each(f"going back to step {step}", lambda writer: writer.rewind(step))

    def close(self) -> None:
        """Close all writers."""
        self._each("closing", lambda writer: writer.close())
        self.writers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, when: str, do: Any) -> None:
        failed = []
        for writer in list(self.writers):
            try:
                do(writer)
            except Exception as error:
                self.writers.remove(writer)
                with suppress(Exception):
                    writer.close()
                failed.append(f"{type(writer).__name__}: {reason(error)}")
        # After all have had their turn: a warning may be an error in this program.
        for what in failed:
            warnings.warn(
                f"watching: a writer failed {when} and is closed; training and the other writers "
                f"go on. {what}",
                RuntimeWarning,
                stacklevel=3,
            )


def _verdict(layer: LayerDrift) -> dict[str, float]:
    return {name: float(getattr(layer, name.removeprefix("drift_"))) for name in DRIFT}


def _check(records: Any) -> None:
    """Whether these are records, and some."""
    if not isinstance(records, Mapping) or not all(
        isinstance(record, Record) for record in records.values()
    ):
        raise TypeError(
            f"Log.write: a {type(records).__name__}, expected path → watch.Record, or a "
            f"health.Drift; write log.write(step, watch.records(seen, variables, grads))."
        )
    if not records:
        raise ValueError(
            "Log.write: no records, expected those of a watched step; write "
            "watch.linen(model.apply, on=True), or watch.nnx(model, on=True), in that step."
        )


NAMES = ("jsonl", "prometheus", "tensorboard")


def open(
    names: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    every: int = 50,
    port: int = 9464,
    address: str = "127.0.0.1",
) -> Log:
    """The `Log` with these writers: `watch.jsonl` and TensorBoard's event file in the folder.

    In processes other than the first nothing is opened.

    Args:
      names: some of "jsonl", "prometheus", "tensorboard".
      folder: made where it is not there.
      every: steps from one record to the next.
      port: of Prometheus.
      address: of Prometheus, on which only this machine is served.

    Raises:
      ValueError: a name is unknown.
      OSError, ModuleNotFoundError: as of the writers. None is left open then.

    >>> import tempfile
    >>> from jaxbn import writers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writers.open(["jsonl"], folder) as log:
    ...         [type(writer).__name__ for writer in log.writers]
    ['JSONLines']
    """
    if isinstance(names, str) or (unknown := sorted(set(names) - set(NAMES))):
        raise ValueError(
            f"writers.open: {names if isinstance(names, str) else unknown!r}, expected a list of "
            f"some of {', '.join(NAMES)}; write writers.open(['jsonl'], folder)."
        )
    log = Log([], every)
    if jax.process_index() != 0:
        return log
    kinds = {
        "prometheus": lambda: Prometheus(port, address),
        "tensorboard": lambda: TensorBoard(folder),
        "jsonl": lambda: JSONLines(Path(folder) / "watch.jsonl"),
    }
    try:
        for name in kinds:  # Prometheus first: it fails without leaving a file
            if name in names:
                log.writers.append(kinds[name]())
    except BaseException:
        log.close()
        raise
    return log
