"""What a person sees of a run: a header, a live line, a line per epoch, the result; plain lines in a job's log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mnist_ray.events import EpochFinished, Event, Started, Validated
from mnist_ray.metrics import Evaluation, Progress

_PLAIN_INTERVAL_S = 10.0


class RunConsole:
    """Prints a run's events; use it as a context, so that the live line is gone when it ends.

    On a terminal one line is redrawn in place; elsewhere a plain line is printed every ten seconds.
    """

    def __init__(self, num_epochs: int, *, quiet: bool) -> None:
        self._num_epochs = num_epochs
        self._quiet = quiet
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._last_plain = time.monotonic()

    def __enter__(self) -> RunConsole:
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, label: str, text: str) -> None:
        """Print a line, its label in a column of its own."""
        if not self._quiet:
            self._console.print(Text.assemble((f"{label:<11}", "bold"), text))

    def waiting(self, text: str) -> None:
        """Show what is waited for until the next event, on the live line only."""
        if self._live.is_started:
            self._live.update(Text(f"{'':<11}{text}", style="dim"), refresh=True)

    def result(self, label: str, text: str) -> None:
        """Print a line that ``--quiet`` leaves standing."""
        self._live.stop()
        self._console.print(Text.assemble((f"{label:<11}", "bold"), text))

    def show(self, event: Event) -> None:
        """Print what an event says, where it says something new."""
        match event:
            case Started():
                self._started(event)
            case Progress():
                self._progress(event)
            case EpochFinished():
                self._epoch_finished(event.last)
            case Validated():
                self.say(
                    "",
                    f"validation after epoch {event.epoch}: loss {event.loss:.4f}, "
                    f"accuracy {event.accuracy:.2%} ({event.seconds:.1f} s, beside the training)",
                )

    def _started(self, event: Started) -> None:
        threads = f"{event.threads} thread{'s' if event.threads > 1 else ''}"
        nodes = len(set(event.hosts))
        where = f" on {nodes} nodes" if nodes > 1 else ""
        self.say(
            "started",
            f"{event.num_workers} × {event.device} with {threads}{where}, {event.precision}"
            + (f"; going on after epoch {event.epoch}, step {event.step}" if event.epoch or event.step else ""),
        )

    def _progress(self, event: Progress) -> None:
        line = (
            f"step {event.step:,}/{event.num_steps:,}  loss {event.loss:.4f}  accuracy {event.sums.accuracy:.2%}  "
            f"{event.images_per_s:,.0f} images/s  {self._left(event)} left"
        )
        label = f"epoch {event.epoch}/{self._num_epochs}"
        if self._live.is_started:
            self._live.update(Text(f"{label:<11}{line}"), refresh=True)
        elif time.monotonic() - self._last_plain >= _PLAIN_INTERVAL_S:
            self._last_plain = time.monotonic()
            self.say(label, line)

    def _left(self, event: Progress) -> str:
        steps_left = (self._num_epochs - event.epoch + 1) * event.num_steps - event.step
        return duration(event.epoch_s / event.step * steps_left)

    def _epoch_finished(self, last: Progress) -> None:
        self.say(
            f"epoch {last.epoch}/{self._num_epochs}",
            f"finished in {last.epoch_s:.2f} s ({last.images_per_s:,.0f} images/s): "
            f"loss {last.sums.loss:.4f}, accuracy {last.sums.accuracy:.2%} on the training images",
        )


def duration(seconds: float) -> str:
    """Return a duration as a person reads it: ``9 s``, ``2 min 5 s``, ``1 h 3 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def confusion_table(evaluation: Evaluation) -> list[str]:
    """Return lines that show the accuracy of each class and which other class it was taken for most often."""
    lines = []
    for label, accuracy in enumerate(evaluation.accuracy_per_class):
        row = evaluation.confusion[label].copy()
        size = int(row.sum())
        row[label] = 0
        mistaken = f", {int(row.max())} taken for {int(row.argmax())}" if row.any() else ""
        if size:
            lines.append(f"{label}: {accuracy:7.2%} of {size:,}{mistaken}")
    return lines
