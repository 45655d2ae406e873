"""What a person sees of a run: a header, a live line, a line per epoch, the result; plain lines in a job's log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mnist_ray.errors import clock_time, count, redact
from mnist_ray.training.events import (
    EpochFinished,
    Event,
    NodeLeaving,
    Progress,
    Started,
    StoppedEarly,
    Stopping,
    Validated,
    WorkersLost,
)
from mnist_ray.workload.base import Workload

_PLAIN_INTERVAL_S, _NOTEBOOK_INTERVAL_S = 10.0, 2.0
_LOG_WIDTH = 240


Self = TypeVar("Self", bound="RunConsole")


class RunConsole:
    """Prints a run's events; use it as a context, so that the live line is gone when it ends.

    On a terminal one line is redrawn in place; elsewhere a plain line is printed every ten seconds, in a notebook every
    two.
    """

    def __init__(self, workload: Workload, num_epochs: int, *, quiet: bool) -> None:
        self._workload = workload
        self._num_epochs = num_epochs
        self._label_width = max(10, len(f"epoch {num_epochs}/{num_epochs}"))
        self._quiet = quiet
        # Whatever FORCE_COLOR says, which Jupyter sets, too. A table in a log is as wide as it needs to be.
        is_terminal = sys.stdout.isatty()
        width = None if is_terminal else _LOG_WIDTH
        style: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self._console = Console(**style, width=width, force_terminal=is_terminal, force_jupyter=False)
        self._plain_interval_s = _NOTEBOOK_INTERVAL_S if "ipykernel" in sys.modules else _PLAIN_INTERVAL_S
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._last_plain = 0.0
        self._attempts = 0
        self._last_progress: Progress | None = None

    def __enter__(self: Self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def say(self, label: str, text: str) -> None:
        """Print a line, its label in a column of its own."""
        if not self._quiet:
            line = self._line(label, text)
            line.rstrip()
            self._console.print(line)

    def waiting(self, text: str) -> None:
        """Show what is waited for until the next event, on the live line only."""
        if self._live.is_started:
            self._live.update(Text(self._column("") + redact(text), style="dim"), refresh=True)

    def rest(self) -> None:
        """Take the live line away for good."""
        self._live.stop()

    def result(self, label: str, text: str) -> None:
        """Print a line that ``--quiet`` leaves standing."""
        self.rest()
        self._console.print(self._line(label, text))

    def show(self, event: Event) -> None:
        """Print what an event says, where it says something new."""
        match event:
            case Started():
                self._started(event)
            case WorkersLost():
                self.say("lost", f"{event.reason}; replacing the workers …")
            case NodeLeaving():
                self.say("note", "a worker's node is about to be taken away; saving a checkpoint")
            case Stopping():
                self.say("note", "interrupted; saving a checkpoint (once more: end at once)")
            case Progress():
                self._progress(event)
            case EpochFinished():
                self._epoch_finished(event.last)
            case Validated():
                self.say(
                    "",
                    f"validation after epoch {event.epoch}: {self._workload.format(event.values)} "
                    f"({event.seconds:.1f} s{', beside the training' if event.is_beside else ''})",
                )
            case StoppedEarly(epoch, best_epoch):
                self.say("stopped", f"after epoch {epoch}: validation was best after epoch {best_epoch}")

    def _started(self, event: Started) -> None:
        self._last_plain = time.monotonic()
        self._attempts += 1
        self._live.update(Text())
        threads = count(event.threads, "thread")
        nodes = len(set(event.hosts))
        where = f" on {nodes} nodes" if nodes > 1 else ""
        for name in event.damaged:
            self.say("note", f"{name} is damaged or was cut off; the one before it is used")
        for note in event.notes:
            self.say("note", note)
        self.say(
            "started" if self._attempts == 1 else "restarted",
            f"{event.num_workers} × {event.device} with {threads}{where}, {event.precision}"
            + self._going_on(event)
            + self._lost_work(event),
        )

    def _going_on(self, event: Started) -> str:
        if event.epoch == self._num_epochs:
            return "; all epochs are trained already"
        return f"; going on in epoch {event.epoch + 1} after step {event.step:,}" if event.epoch or event.step else ""

    def _lost_work(self, event: Started) -> str:
        """Say what the last attempt had done that is to be done again."""
        last = self._last_progress
        if last is None:
            return ""
        steps = max(0, last.total_step - event.total_step)
        return f"; {steps * last.epoch_s / last.step:.1f} s of work lost ({count(steps, 'step')})"

    def _progress(self, event: Progress) -> None:
        self._last_progress = event
        metrics = "".join(f"  {m.name} {m.format(event.so_far[m.name], 1)}" for m in self._workload.metrics)
        line = (
            f"{event.step:,}/{event.num_steps:,}  loss {event.loss:.4f}{metrics}  "
            f"{event.examples_per_s:,.0f} {self._workload.nouns}/s  {clock_time(self._left_s(event))} left"
        )
        label = f"epoch {event.epoch}/{self._num_epochs}"
        if self._live.is_started:
            self._live.update(Text(self._column(label) + redact(line)), refresh=True)
        elif time.monotonic() - self._last_plain >= self._plain_interval_s:
            self._last_plain = time.monotonic()
            self.say(label, line)

    def _left_s(self, event: Progress) -> float:
        steps_left = (self._num_epochs - event.epoch + 1) * event.num_steps - event.step
        return event.epoch_s / event.step * steps_left

    def _epoch_finished(self, last: Progress) -> None:
        self.say(
            f"epoch {last.epoch}/{self._num_epochs}",
            f"finished in {last.epoch_s:.2f} s ({last.examples_per_s:,.0f} {self._workload.nouns}/s): "
            f"{self._workload.format(last.so_far)} on the training {self._workload.nouns}",
        )

    def _line(self, label: str, text: str) -> Text:
        return Text.assemble((self._column(redact(label)), "bold"), redact(text))

    def _column(self, label: str) -> str:
        return f"{label:<{self._label_width}} "
