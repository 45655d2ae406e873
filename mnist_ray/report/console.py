"""A run's output: a header, a live line, a line per epoch, and the result. In a job's log, all lines are plain."""

from __future__ import annotations

import math
import sys
import time
from importlib.util import find_spec
from typing import Self, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mnist_ray.data.data import Evaluated
from mnist_ray.output import Output
from mnist_ray.text import clock_time, count, redact
from mnist_ray.training import events
from mnist_ray.training.events import Event, Progress, Started
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import IN_WORDS

_PLAIN_INTERVAL_S = 10.0
LOG_WIDTH = 240


class RunConsole:
    """Prints a run's events; a context manager, which removes the live line at the end.

    On a terminal, and in a notebook with ipywidgets, one line is redrawn in place. Elsewhere, a plain line is printed
    every ten seconds.
    """

    def __init__(self, workload: Workload, num_epochs: int, *, quiet: bool) -> None:
        self._workload, self._num_epochs, self._quiet = workload, num_epochs, quiet
        self._label_width = max(10, len(f"epoch {num_epochs}/{num_epochs}"))
        is_terminal = getattr(sys.stdout, "isatty", bool)()  # an application that embeds Python may have replaced it
        is_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None  # rich redraws with it
        self._console = Console(
            file=cast(TextIO, Output(sys.stdout)),  # training must survive the loss of its output
            force_terminal=is_terminal,  # not from FORCE_COLOR, which Jupyter sets
            force_jupyter=is_notebook,
            width=None if is_terminal else LOG_WIDTH,  # a table in a log may be wide
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._last_plain = 0.0
        self._has_started, self._is_lost = False, False
        self._last_progress: Progress | None = None

    def __enter__(self) -> Self:
        if (self._console.is_terminal or self._console.is_jupyter) and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Remove the live line for good."""
        self._live.stop()

    def say(self, label: str, text: str) -> None:
        """Print a line, with the label in its own column. With ``--quiet``, print nothing."""
        if not self._quiet:
            line = self._line(label, text)
            line.rstrip()
            self._console.print(line)

    def result(self, label: str, text: str) -> None:
        """Print a line, even with ``--quiet``."""
        self.rest()
        self._console.print(self._line(label, text))

    def waiting(self, text: str) -> None:
        """Show on the live line what the job is waiting for, until the next event."""
        if self._live.is_started:
            self._live.update(Text(self._column("") + redact(text), style="dim"), refresh=True)

    def show(self, event: Event) -> None:
        """Print an event."""
        match event:
            case Started():
                self._started(event)
            case events.WorkersLost(reason):
                if not self._is_lost:  # several attempts to replace a lost node's workers may fail
                    self.say("lost", f"{reason}; replacing the workers …")
                self._is_lost = True
            case events.Note(text):
                self.say("note", text)
            case Progress():
                self._progress(event)
            case events.EpochFinished(last):
                done = f"finished in {last.epoch_s:.2f} s ({last.examples_per_s:,.0f} {self._workload.nouns}/s)"
                values = f"{self._workload.format(last.so_far)} on the training {self._workload.nouns}"
                self.say(f"epoch {last.epoch}/{self._num_epochs}", f"{done}: {values}")
            case events.Validated():
                values = self._workload.format(event.values)
                self.say("", f"validation after epoch {event.epoch:.4g}: {values} ({event.seconds:.1f} s)")
                for name, of_set in event.others.items():
                    self.say("", f"on {name}: {self._workload.format(of_set)}")
                if math.isnan(event.values[(monitor := self._workload.monitor.name)]):
                    self.say("note", f"{monitor} is NaN: the checkpoint of epoch {event.epoch:.4g} counts as the worst")

    def show_evaluation(self, tested: Evaluation, evaluated: Evaluated = "test") -> None:
        """Print the result on a set."""
        workload = self._workload
        for label, line in workload.lines(tested.columns):
            self.say(label, line)
        values = tested.values(workload)
        own_first = sorted(workload.all_metrics, key=lambda metric: metric not in workload.metrics)
        metrics = ", ".join(f"{metric.name} {metric.format(values[metric.name])}" for metric in own_first)
        self.result(IN_WORDS[evaluated], f"{metrics} on {tested.num_examples:,} {workload.nouns}")

    def _started(self, event: Started) -> None:
        self._last_plain = time.monotonic()
        self._live.update(Text())
        for name in event.damaged:
            self.say("note", f"{name} is damaged or was cut off; using the one before it")
        line = f"{event.num_workers} × {event.device} with {count(event.threads, 'thread')}"
        if (nodes := len(set(event.hosts))) > 1:
            line += f" on {nodes} nodes"
        line += f", {event.precision}"
        if event.epoch == self._num_epochs:
            line += "; all epochs are already trained"
        elif event.epoch or event.step:
            line += f"; continuing in epoch {event.epoch + 1} after step {event.step:,}"
        if last := self._last_progress:
            steps = max(0, last.total_step - event.total_step)
            line += f"; {steps * last.epoch_s / last.step:.1f} s of work lost ({count(steps, 'step')})"
        self.say("restarted" if self._has_started else "started", line)
        self._has_started, self._is_lost = True, False

    def _progress(self, event: Progress) -> None:
        self._last_progress = event
        known = [metric for metric in self._workload.all_metrics[1:] if metric.name in event.window]
        metrics = "".join(f"  {metric.name} {metric.format(event.window[metric.name], 1)}" for metric in known)
        steps_left = (self._num_epochs - event.epoch + 1) * event.epoch_steps - event.step
        line = (
            f"{event.step:,}/{event.epoch_steps:,}  loss {event.loss:.4f}{metrics}  "
            f"{event.examples_per_s:,.0f} {self._workload.nouns}/s  "
            f"{clock_time(event.epoch_s / event.step * steps_left)} left"
        )
        self.show_now(f"epoch {event.epoch}/{self._num_epochs}", line)

    def show_now(self, label: str, line: str) -> None:
        """Redraw the live line; without one, print the line if the last one was printed some time ago."""
        if self._live.is_started:
            self._live.update(Text(self._column(label) + redact(line)), refresh=True)
        elif time.monotonic() - self._last_plain >= _PLAIN_INTERVAL_S:
            self._last_plain = time.monotonic()
            self.say(label, line)

    def _line(self, label: str, text: str) -> Text:
        return Text.assemble((self._column(redact(label)), "bold"), redact(text))

    def _column(self, label: str) -> str:
        return f"{label:<{self._label_width}} "
