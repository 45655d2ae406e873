"""The story of a sweep, and what people see of it: a header, and a live table, or a line a trial."""

from __future__ import annotations

import functools
import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray.errors import clock_time, count, format_settings, redact
from mnist_ray.run.console import RunConsole
from mnist_ray.run.session import Session, say_data
from mnist_ray.sweep.options import Sweep, load_data
from mnist_ray.sweep.trials import DONE, ENDED, FAILED, LOST, STOPPED, TrialRecord, TrialTable


def tune(sweep: Sweep) -> None:
    """Data, Ray, search, then fit, evaluate and report the best. Raises as ``train`` does."""
    with Session(sweep.job, "mnist_ray.sweep.trial", sweep.workers) as session:
        sweep, data = load_data(sweep)
        console = SweepConsole(sweep)
        session.begin(sweep.job, data, console, functools.partial(say_sweep, sweep))
        with session.ray(sweep.batch_sizes):
            from mnist_ray.sweep.search import check, search, train_chosen  # imports torch, which is there by now

            if sweep.job.output.check:
                check(session, sweep)
                return
            table = search(session, sweep, console.show_table)
            console.show_result(table)
            train_chosen(session, sweep, table)


def say_sweep(sweep: Sweep, session: Session) -> None:
    """Say what is going to be searched."""
    job, config, console = sweep.job, sweep.config, session.console
    console.say("sweep", job.run.name)
    say_data(console, job, session.data)
    trials = f"{count(config.num_trials, 'trial')} of {count(job.train.num_epochs, 'epoch')}"
    if config.num_confirmed:
        trials += f", then the best {config.num_confirmed} with two more seeds each"
    console.say("search", f"{config.search}, {trials}: {sweep.space.describe()}; scheduler {config.scheduler}")
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")


class SweepConsole(RunConsole):
    """Prints a sweep; on a terminal its table is redrawn in place, elsewhere each trial gets a line as it ends."""

    def __init__(self, sweep: Sweep) -> None:
        job = sweep.job
        super().__init__(job.workload, job.train.num_epochs, quiet=job.output.quiet)
        self._time_budget_s = sweep.config.time_budget_s
        self._start = time.monotonic()
        self._num_ended = 0  # trials, in this process

    def show_table(self, table: TrialTable, ended: TrialRecord | None = None) -> None:
        """Show how the sweep stands once a trial has ``ended``, or reported."""
        self._num_ended += ended is not None
        if self._live.is_started:
            self._live.update(Group(self._table(table), Text(self._summary(table))), refresh=True)
        elif ended is not None:
            *_, epochs, monitor, _, state = table.console_row(ended, self._num_epochs)
            tried = f"{format_settings(ended.point.values)}, seed {ended.point.seed}"
            line = f"{tried}: {monitor} after {epochs} epochs, {state} · {self._summary(table)}"
            self.say(f"trial {ended.trial}", line)

    def show_result(self, table: TrialTable) -> None:
        """Print the whole table, sorted, and what stopping early has saved."""
        self.rest()
        if not self._quiet:
            self._console.print(self._table(table))
        trained = sum(record.epochs for record in table.by_point.values())
        full = self._num_epochs * table.count(DONE, STOPPED)
        saved = full - sum(record.epochs for record in table.by_point.values() if record.state in (DONE, STOPPED))
        self.say("epochs", f"{trained:.4g} trained; stopping early saved {saved:.4g} of {full}")

    def _table(self, table: TrialTable) -> Table:
        view = Table(box=None, padding=(0, 1, 0, 0))
        for column in table.console_columns:
            view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
        for record in table.ranked:
            view.add_row(*map(redact, table.console_row(record, self._num_epochs)))
        return view

    def _summary(self, table: TrialTable) -> str:
        done, stopped, failed = table.count(DONE), table.count(STOPPED), table.count(FAILED, LOST)
        best, left = "no result yet", self._seconds_left(table)
        if table.best:
            best = f"best {self._workload.monitor.format(table.best.val_monitor)} ({table.best.seeds_text})"
        counts = f"{done} done, {stopped} stopped early, {failed} failed of {table.num_planned}"
        return f"{counts}; {best}" + ("" if left is None else f"; about {clock_time(left)} left")

    def _seconds_left(self, table: TrialTable) -> float | None:
        """Estimate the seconds left from those that a trial of this process took, on average."""
        if self._num_ended == 0:
            return None
        passed = time.monotonic() - self._start
        estimate = passed / self._num_ended * (table.num_planned - table.count(*ENDED))
        return estimate if self._time_budget_s is None else min(estimate, self._time_budget_s - passed)
