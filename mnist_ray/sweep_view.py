"""What a person sees of a sweep: a live table, or a line a trial; and its picture."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray.config import JobConfig, SweepConfig
from mnist_ray.console import RunConsole, clock_time
from mnist_ray.search import DONE, FAILED, RUNNING, STOPPED, TrialRecord, TrialTable, row_of

_COLUMNS = ("trial", "batch size", "learning rate", "seed", "epochs", "accuracy", "images/s", "state")


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
        return f"{', '.join(counts)} of {table.num_planned}; {best}" + (
            "" if left is None else f"; about {clock_time(left)} left"
        )

    def _seconds_left(self, table: TrialTable) -> float | None:
        """Estimate the seconds left from those that a trial of this process took, on average."""
        finished = table.count(DONE, STOPPED, FAILED) - (self._finished_before or 0)
        if finished <= 0:
            return None
        left = table.num_planned - table.count(DONE, STOPPED, FAILED)
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
    _, size, rate, seed, epochs, accuracy, _, state = row_of(record, num_epochs)
    return f"batch {size}, lr {rate}, seed {seed}: {accuracy} after {epochs} epochs, {state}"


def _table(table: TrialTable, num_epochs: int) -> Table:
    view = Table(box=None, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
    for record in table.ranked:
        view.add_row(*row_of(record, num_epochs))
    return view


def draw(table: TrialTable, num_epochs: int) -> bytes:
    """Return a PNG: validation accuracy over learning rate, a colour and marker a batch size.

    Trials that were stopped early are hollow, the best configuration's are ringed, failed ones are left out. The
    axis is logarithmic in the error, so that good trials, which differ by tenths of a point, can be told apart.
    """
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [record for record in table.by_point.values() if record.score[0] >= 0 and record.state != RUNNING]
    for number, size in enumerate(sorted({record.batch_size for record in shown})):
        style: dict[str, Any] = {"color": f"C{number}", "marker": "osD^vP*X"[number % 8], "linestyle": "none"}
        for record in shown:
            if record.batch_size == size:
                fill: dict[str, Any] = {"markerfacecolor": "none"} if record.state == STOPPED else {}
                axes.plot(record.learning_rate, _error(record), markersize=8, **style, **fill)
        axes.plot([], [], label=f"batch size {size}", **style)
    axes.plot([], [], "o", color="grey", markerfacecolor="none", label="stopped early")
    title = f"{len(shown)} trials of at most {num_epochs} epochs"
    best = table.best
    if best is not None:
        for record in best.records:
            axes.plot(record.learning_rate, _error(record), "o", color="black", markerfacecolor="none", markersize=15)
        axes.plot([], [], "o", color="black", markerfacecolor="none", markersize=12, label="best configuration")
        first = best.records[0]
        seeds = f", mean of {len(best.records)} seeds" if len(best.records) > 1 else ""
        title += f"\nbest: batch size {first.batch_size}, learning rate {first.learning_rate:g}"
        title += f" ({best.val_accuracy:.2%}{seeds})"
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda error, _: f"{100 - error:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("learning rate (peak of the schedule)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _error(record: TrialRecord) -> float:
    """Return the percentage of validation images that were wrong; not quite 0, for the logarithm."""
    return max(100 * (1 - record.val_accuracy), 1e-3)
