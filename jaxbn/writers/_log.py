"""The writers of a training loop: when and in which process they write; a writer that fails."""

import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import jax

from jaxbn._files import check_is_path
from jaxbn._op.axes import is_integer
from jaxbn._text import a_kind, short
from jaxbn.health._drift import Drift, LayerDrift
from jaxbn.watch import Record, channels, metrics
from jaxbn.watch._metrics import Channels
from jaxbn.writers._json_lines import JSONLines
from jaxbn.writers._prometheus import DRIFT, Prometheus
from jaxbn.writers._tensorboard import TensorBoard
from jaxbn.writers._writer import Writer, reason


class Log:
    """The writers of a training loop.

    Use `open` for the writers of this package, or `Log` itself with writers of your own. Only
    process 0 writes. `due(step)` is the same in every process. It must be: a watched step may
    contain collectives, so all processes run the watched step or none does. A writer that fails
    during training is closed and dropped. A RuntimeWarning then names the writer, the step and the
    error, and training goes on. What the writer has written before stays whole.

    Args:
      writers: instances of `Writer`.
      every: the number of steps from one watched step to the next; 0 for none.

    Raises:
      TypeError: writers are no list of writers, or every is no whole number.
      ValueError: every is negative.

    >>> from jaxbn import writers
    >>> with writers.Log([], every=50) as log:
    ...     [step for step in range(200) if log.due(step)]
    [0, 50, 100, 150]
    """

    def __init__(self, writers: Sequence[Writer], every: int = 50):
        """Keep the writers in process 0, and none in other processes."""
        writers = _checked(writers)
        whole = is_integer(every)
        if not whole or every < 0:
            raise (ValueError if whole else TypeError)(
                f"Log: every={every!r}, expected a number of steps, or 0 for never; write every=50."
            )
        self.every = every
        self.writers = writers if jax.process_index() == 0 else []

    def due(self, step: int) -> bool:
        """Whether to watch this step."""
        return self.every > 0 and _whole("due", step) % self.every == 0

    def write(
        self, step: int, records: Mapping[str, Record] | Drift, *more: Mapping[str, Record] | Drift
    ) -> None:
        """Give the figures of a watched step to the writers.

        Args:
          step: the training step.
          records: path → `jaxbn.watch.Record`, which are brought to the host; or a
            `jaxbn.health.Drift`, the verdict on served data. Of the latter the layers' figures are
            written, `drift_alarm` (1 or 0), `drift_figure` and so on, and no arrays.
          *more: records and verdicts of the same step. The writers get the figures of all together,
            so that one scrape, or one line, has both.

        Raises:
          TypeError: records are something else, or step is no whole number.
          ValueError: records are empty.

        >>> from jaxbn import health, writers
        >>> class Print(writers.Writer):
        ...     def write(self, step, figures, arrays):
        ...         print(step, figures["bn"]["drift_alarm"])
        >>> layer = health.LayerDrift("bn", True, 9.0, 3.9, 0.5, 0.1, rows=256, values=300)
        >>> writers.Log([Print()]).write(7, health.Drift(True, (layer,), (), {}))
        7 1.0
        """
        step, several = _whole("write", step), (records, *more)
        for one in several:
            _check_records(one)
        if not self.writers:
            return
        figures: dict[str, dict[str, float]] = {}
        arrays: dict[str, Channels] = {}
        for one in several:
            if isinstance(one, Drift):
                its = {layer.layer: _verdict(layer) for layer in one.layers}
            else:
                on_host: dict[str, Record] = jax.device_get(dict(one))
                its = metrics(on_host)
                arrays |= {layer: channels(record) for layer, record in on_host.items()}
            for layer, of_layer in its.items():
                figures[layer] = figures.get(layer, {}) | of_layer
        self._each(f"at step {step}", lambda writer: writer.write(step, figures, arrays))

    def rewind(self, step: int) -> None:
        """Drop what was written for this step and later ones, because training repeats them."""
        whole = _whole("rewind", step)
        self._each(f"going back to step {whole}", lambda writer: writer.rewind(whole))

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
        # Warnings come after all writers have written, because a program may turn a warning into
        # an error.
        for what in failed:
            warnings.warn(
                f"watching: a writer failed {when} and is closed; training and the other writers "
                f"go on. {what}",
                RuntimeWarning,
                stacklevel=3,
            )


def _verdict(layer: LayerDrift) -> dict[str, float]:
    return {name: float(getattr(layer, name.removeprefix("drift_"))) for name in DRIFT}


def _whole(call: str, step: Any) -> int:
    """The step as an int, which every writer can take: of NumPy and JAX it may be an array."""
    try:
        return operator.index(step)
    except TypeError:
        came = repr(step) if isinstance(step, str | float) else a_kind(step)
        raise TypeError(
            f"Log.{call}: step is {came}, expected a whole number; write int(step)."
        ) from None


def _checked(writers: Any) -> list[Writer]:
    """The writers as a list. Raises unless each is an instance with a method `write`."""
    several = list(writers) if isinstance(writers, Iterable) else None
    if several is not None and all(
        callable(getattr(v, "write", None)) and not isinstance(v, type) for v in several
    ):
        return several
    came = a_kind(writers) if several is None else f"a list of {short(map(a_kind, several))}"
    raise TypeError(
        f"Log: writers is {came}, expected a list of writers; write "
        f"writers.Log([writers.JSONLines(path)])."
    )


def _check_records(records: Any) -> None:
    """Raises unless this is a verdict on drift, or records, at least one."""
    if isinstance(records, Drift):
        return
    if not isinstance(records, Mapping) or not all(
        isinstance(record, Record) for record in records.values()
    ):
        raise TypeError(
            f"Log.write: called with {type(records).__name__}, expected path → watch.Record, or a "
            f"health.Drift; write log.write(step, watch.records(seen, variables, grads))."
        )
    if not records:
        raise ValueError(
            "Log.write: no records, expected the records of a watched step; write "
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
    """A `Log` with the writers of these names.

    Use it before the training loop, in every process; only the first process opens writers. The
    files are `watch.jsonl` and TensorBoard's event file, in the folder.

    Args:
      names: some of "jsonl", "prometheus", "tensorboard".
      folder: of the files; it is made if it is missing.
      every: the number of steps from one watched step to the next.
      port: of `Prometheus`.
      address: of `Prometheus`; by default only this machine can read the figures.

    Returns:
      The `Log`, which is a context that closes the writers at its end.

    Raises:
      TypeError: folder is no path.
      ValueError: a name is unknown.
      OSError, ModuleNotFoundError: a writer cannot be opened. The others are closed then.

    >>> import tempfile
    >>> from jaxbn import writers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writers.open(["jsonl"], folder) as log:
    ...         [type(writer).__name__ for writer in log.writers]
    ['JSONLines']
    """
    several = isinstance(names, Iterable) and not isinstance(names, str)
    if not several or (unknown := sorted({*names} - {*NAMES}, key=str)):
        raise ValueError(
            f"writers.open: {unknown if several else names!r}, expected a list of "
            f"some of {', '.join(NAMES)}; write writers.open(['jsonl'], folder)."
        )
    check_is_path("writers.open", folder, "folder")
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
