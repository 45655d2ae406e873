"""What a person sees of a sweep: a live table, or a line a trial."""

from __future__ import annotations

import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray.config import JobConfig, SweepConfig
from mnist_ray.display.console import RunConsole, clock_time
from mnist_ray.sweeps.search import DONE, FAILED, STOPPED, TRIAL_COLUMNS, TrialRecord, TrialTable, row_of


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
        if table.best and len(table.best.records) > 1:
            best += f" (mean of {len(table.best.records)} seeds)"
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
    for column in TRIAL_COLUMNS:
        view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
    for record in table.ranked:
        view.add_row(*row_of(record, num_epochs))
    return view
