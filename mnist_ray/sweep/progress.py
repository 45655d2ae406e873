"""What people see of a sweep as it goes: a header, and a live table, or a line a trial."""

from __future__ import annotations

import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray.errors import clock_time, count, format_settings, redact
from mnist_ray.run.console import RunConsole
from mnist_ray.run.session import Session, say_data
from mnist_ray.sweep.options import Sweep
from mnist_ray.sweep.trials import DONE, ENDED, FAILED, LOST, STOPPED, TrialRecord, TrialTable


class SweepConsole(RunConsole):
    """Prints a sweep; on a terminal its table is redrawn in place, elsewhere each trial gets a line as it ends."""

    def __init__(self, sweep: Sweep) -> None:
        job = sweep.job
        super().__init__(job.workload, job.train.num_epochs, quiet=job.output.quiet)
        self._time_budget_s = sweep.config.time_budget_s
        self._start = time.monotonic()
        self._finished_before: int | None = None
        self._printed: set[int] = set()

    def show_table(self, table: TrialTable) -> None:
        """Show how the sweep stands."""
        if self._finished_before is None:
            self._finished_before = table.count(*ENDED)
            self._printed = {record.trial for record in table.by_point.values() if record.is_finished}
        if self._live.is_started:
            self._live.update(Group(_table(table, self._num_epochs), Text(self._summary(table))), refresh=True)
            return
        for record in table.by_point.values():
            if record.is_finished and record.trial not in self._printed:
                self._printed.add(record.trial)
                self.say(f"trial {record.trial}", f"{_line(table, record, self._num_epochs)} · {self._summary(table)}")

    def _summary(self, table: TrialTable) -> str:
        counts = [
            f"{table.count(DONE)} done",
            f"{table.count(STOPPED)} stopped early",
            f"{table.count(FAILED, LOST)} failed",
        ]
        best = "no result yet"
        if table.best:
            best = f"best {self._workload.monitor.format(table.best.val_monitor)} ({table.best.seeds_text})"
        left = self._seconds_left(table)
        return f"{', '.join(counts)} of {table.num_planned}; {best}" + (
            "" if left is None else f"; about {clock_time(left)} left"
        )

    def _seconds_left(self, table: TrialTable) -> float | None:
        """Estimate the seconds left from those that a trial of this process took, on average."""
        finished = table.count(*ENDED) - (self._finished_before or 0)
        if finished <= 0:
            return None
        left = table.num_planned - table.count(*ENDED)
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
    *_, epochs, monitor, _, state = table.console_row(record, num_epochs)
    return f"{format_settings(record.point.values)}, seed {record.point.seed}: {monitor} after {epochs} epochs, {state}"


def _table(table: TrialTable, num_epochs: int) -> Table:
    view = Table(box=None, padding=(0, 1, 0, 0))
    for column in table.console_columns:
        view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
    for record in table.ranked:
        view.add_row(*map(redact, table.console_row(record, num_epochs)))
    return view


def say_sweep(sweep: Sweep, session: Session) -> None:
    """Say what is going to be searched, and show what is waited for."""
    job, config, console = sweep.job, sweep.config, session.console
    console.say("sweep", job.run.name)
    say_data(console, job, session.data)
    trials = f"{count(config.num_trials, 'trial')} of {count(job.train.num_epochs, 'epoch')}"
    if config.num_confirmed:
        trials += f", then the best {config.num_confirmed} with two more seeds each"
    console.say("search", f"{config.search}, {trials}: {sweep.space.describe()}; scheduler {config.scheduler}")
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")
