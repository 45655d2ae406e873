"""What people see of a sweep: a live table, or a line a trial, and its part of the report."""

from __future__ import annotations

import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray import drawing
from mnist_ray.display.console import RunConsole
from mnist_ray.display.report import Sections
from mnist_ray.settings import parse_config
from mnist_ray.storage import CONFIG_FILE, TRIALS_FILE, RunFolder
from mnist_ray.sweeps.job import SWEEP_FILE
from mnist_ray.sweeps.space import described, space_of
from mnist_ray.sweeps.trials import DONE, FAILED, STOPPED, TrialRecord, TrialTable
from mnist_ray.wording import clock_time
from mnist_ray.workload.interface import Workload


class SweepConsole(RunConsole):
    """Prints a sweep; on a terminal its table is redrawn in place, elsewhere each trial gets a line as it ends."""

    def __init__(self, workload: Workload, num_epochs: int, time_budget_s: float | None, *, quiet: bool) -> None:
        super().__init__(workload, num_epochs, quiet=quiet)
        self._time_budget_s = time_budget_s
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
                self.say(f"trial {record.trial}", f"{_line(table, record, self._num_epochs)} · {self._summary(table)}")

    def _summary(self, table: TrialTable) -> str:
        counts = [f"{table.count(DONE)} done", f"{table.count(STOPPED)} stopped early", f"{table.count(FAILED)} failed"]
        best = "none validated yet"
        if table.best:
            best = f"best {self._workload.criterion.shown(table.best.val_criterion)} ({table.best.shown_seeds})"
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
        if self._time_budget_s is None:
            return estimate
        return min(estimate, self._time_budget_s - (time.monotonic() - self._start))

    def result_table(self, table: TrialTable) -> None:
        """Print the whole table, sorted, and what stopping early has saved."""
        if not self._quiet:
            self._console.print(_table(table, self._num_epochs))
        trained = sum(record.epochs for record in table.by_point.values())
        full = self._num_epochs * table.count(DONE, STOPPED)
        saved = full - sum(record.epochs for record in table.by_point.values() if record.state in (DONE, STOPPED))
        self.say("epochs", f"{trained:.4g} trained; stopping early saved {saved:.4g} of {full}")


def _line(table: TrialTable, record: TrialRecord, num_epochs: int) -> str:
    *_, epochs, criterion, _, state = table.shown_row(record, num_epochs)
    return f"{described(record.point.values)}, seed {record.point.seed}: {criterion} after {epochs} epochs, {state}"


def _table(table: TrialTable, num_epochs: int) -> Table:
    view = Table(box=None, padding=(0, 1, 0, 0))
    for column in table.shown_columns:
        view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
    for record in table.ranked:
        view.add_row(*table.shown_row(record, num_epochs))
    return view


def sections(run: RunFolder, workload: type[Workload]) -> Sections:
    """Return a sweep's part of the report that lies in its folder; nothing where the run is no sweep.

    Raises UsageError where its files are damaged.
    """
    from mnist_ray.sweeps.picture import draw  # imports matplotlib, which the trials need not wait for

    trials, settings = run.read_text(TRIALS_FILE), run.read_text(SWEEP_FILE)
    if trials is None:
        return Sections()
    values = {} if settings is None else parse_config(settings, run.inside(SWEEP_FILE).uri)
    num_epochs = parse_config(run.read_text(CONFIG_FILE) or "{}", run.inside(CONFIG_FILE).uri)["num_epochs"]
    table = TrialTable(workload, space_of(workload, values)).read(trials)
    criterion = table.workload.criterion.name
    alt = f"Validation {criterion} of {len(table.by_point)} trials; the table has all figures"
    caption = "Hollow: stopped early. Ringed: the best configuration."
    rows = [table.shown_row(record, num_epochs) for record in table.ranked]
    return Sections(
        [drawing.Picture("sweep", "Trials", alt, draw(table, num_epochs), caption)],
        [drawing.Table("Trials, best first", table.shown_columns, rows)],
    )
