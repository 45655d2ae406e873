"""What a person sees of a sweep: a live table, or a line a trial; and its picture."""

from __future__ import annotations

import io
import math
import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray.config import JobConfig, SweepConfig
from mnist_ray.console import RunConsole, clock_time
from mnist_ray.search import DONE, FAILED, RUNNING, STOPPED, TrialRecord, TrialTable, ranked_rows

_COLUMNS = ("trial", "batch size", "learning rate", "epochs", "accuracy", "images/s", "state")


class SweepConsole(RunConsole):
    """Prints a sweep; on a terminal its table is redrawn in place, elsewhere each trial gets a line as it ends."""

    def __init__(self, sweep: SweepConfig, job: JobConfig, concurrent: int) -> None:
        super().__init__(job.train.num_epochs, quiet=job.output.quiet)
        self._sweep = sweep
        self._concurrent = concurrent
        self._start = time.monotonic()
        self._finished_before: int | None = None
        self._printed: set[int] = set()

    def show_table(self, table: TrialTable) -> None:
        """Show how the sweep stands."""
        if self._finished_before is None:
            self._finished_before = table.count(DONE, STOPPED, FAILED)
            self._printed = {record.trial for record in table.by_point.values() if record.is_finished}
        if self._live.is_started:
            self._live.update(Group(_table(table, self._num_epochs), Text(self._summary(table))), refresh=True)
            return
        for record in table.by_point.values():
            if record.is_finished and record.trial not in self._printed:
                self._printed.add(record.trial)
                self.say(f"trial {record.trial}", f"{_line(record, self._num_epochs)} · {self._summary(table)}")

    def _summary(self, table: TrialTable) -> str:
        counts = [f"{table.count(DONE)} done", f"{table.count(STOPPED)} stopped early", f"{table.count(FAILED)} failed"]
        best = f"best {table.best.val_accuracy:.2%}" if table.best else "none validated yet"
        left = self._seconds_left(table)
        return f"{', '.join(counts)} of {self._sweep.num_trials}; {best}" + (
            "" if left is None else f"; about {clock_time(left)} left"
        )

    def _seconds_left(self, table: TrialTable) -> float | None:
        """Estimate the seconds left from those that a trial of this process took, on average."""
        finished = table.count(DONE, STOPPED, FAILED) - (self._finished_before or 0)
        if finished <= 0:
            return None
        left = self._sweep.num_trials - table.count(DONE, STOPPED, FAILED)
        estimate = (time.monotonic() - self._start) / finished * left
        if self._sweep.time_budget_s is None:
            return estimate
        return min(estimate, self._sweep.time_budget_s - (time.monotonic() - self._start))

    def result_table(self, table: TrialTable) -> None:
        """Print the whole table, sorted, and what stopping early has saved."""
        if not self._quiet:
            self._console.print(_table(table, self._num_epochs))
        trained = table.epochs_run()
        full = self._num_epochs * table.count(DONE, STOPPED)
        saved = full - sum(record.epochs for record in table.by_point.values() if record.state in (DONE, STOPPED))
        self.say("epochs", f"{trained:.4g} trained; stopping early saved {saved:.4g} of {full}")


def _line(record: TrialRecord, num_epochs: int) -> str:
    accuracy = "-" if math.isnan(record.val_accuracy) else f"{record.val_accuracy:.2%}"
    return (
        f"batch {record.batch_size}, lr {record.learning_rate:g}: {accuracy} after {record.epochs:.3g}/{num_epochs} "
        f"epochs, {record.state}" + (f": {record.reason}" if record.reason else "")
    )


def _table(table: TrialTable, num_epochs: int) -> Table:
    view = Table(box=None, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
    for row in ranked_rows(table, num_epochs):
        view.add_row(*row)
    return view


def draw(table: TrialTable, num_epochs: int) -> bytes:
    """Return a PNG: validation accuracy over learning rate, a colour and marker a batch size.

    Trials that were stopped early are hollow; the best is ringed and labelled. Failed trials are not drawn.
    """
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [record for record in table.by_point.values() if record.score[0] >= 0 and record.state != RUNNING]
    sizes = sorted({record.batch_size for record in shown})
    for number, size in enumerate(sizes):
        colour, marker = f"C{number}", "osD^vP*X"[number % 8]
        for record in (record for record in shown if record.batch_size == size):
            face = "none" if record.state == STOPPED else colour
            point = (record.learning_rate, 100 * record.val_accuracy)
            axes.plot(*point, marker=marker, markersize=8, color=colour, markerfacecolor=face, linestyle="none")
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=f"batch size {size}")
    axes.plot([], [], marker="o", color="grey", markerfacecolor="none", linestyle="none", label="stopped early")
    best = table.best
    if best is not None:
        at = (best.learning_rate, 100 * best.val_accuracy)
        axes.plot(*at, marker="o", markersize=16, color="black", markerfacecolor="none", linestyle="none")
        text = f"best: {best.val_accuracy:.2%}\nbatch size {best.batch_size}, learning rate {best.learning_rate:g}"
        axes.annotate(text, at, xytext=(0, -16), textcoords="offset points", ha="center", va="top")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))
    axes.set_xlabel("learning rate (peak of the schedule)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(f"{len(shown)} trials of at most {num_epochs} epochs")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
