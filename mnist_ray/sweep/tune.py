"""A sweep from start to end, with its output on the console. Imports neither torch nor Ray at the top."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mnist_ray import settings
from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.data.data import Splits
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job, read_job
from mnist_ray.job.job_data import check_against_data, load_splits
from mnist_ray.job.session import opened, started
from mnist_ray.record.header import say_data, say_result
from mnist_ray.report.console import RunConsole
from mnist_ray.settings import Given
from mnist_ray.storage import TRIALS_FILE
from mnist_ray.sweep.proposals import propose
from mnist_ray.sweep.ranking import Averaged, find_best, ranked
from mnist_ray.sweep.space import Space, space_of
from mnist_ray.sweep.trials import BEST_FILE, DONE, FAILED, LOST, STOPPED, Sweep, TrialRecord, TrialTable
from mnist_ray.text import command, count, format_settings, format_value, in_words, redact
from mnist_ray.workload.base import Workload


def read_sweep(given: Given | None = None) -> Sweep:
    """Read ``given``, or the command line of ``jobs/tune.py``. Raises UsageError, and JobError for damaged trials."""
    job = read_job(given, "tune")
    config = settings.build(SweepConfig, job.asked)
    space = space_of(type(job.workload), job.asked, fixed=job.given)
    if job.workers.num_workers == 0:
        raise UsageError("a sweep runs on Ray: leave --num-workers 0 out")
    points = propose(space, config, job.train.seed)  # raises if there are too few trials for a grid
    jobs = [job.with_values(point.values) for point in points]  # raises if settings contradict each other
    _check_used(job, space, [each.train for each in jobs])
    if config.search_algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UsageError("--search-algorithm optuna needs Optuna: pip install -e '.[optuna]'")
    sweep = Sweep(config, space, job)
    if find_best(sweep.table()) is None and job.run.exists(BEST_FILE):  # a new choice would continue the old one's run
        remedy = f"{command('train')} --config {job.run.inside(BEST_FILE).uri}"
        raise JobError(f"{job.run.uri} has {BEST_FILE}, but no {TRIALS_FILE}; train the best with {remedy}")
    return sweep


def _check_used(job: Job, space: Space, trials: Sequence[TrainConfig]) -> None:
    """Raise UsageError if a searched or given setting has no effect in any trial."""
    unused = set[str]()
    if type(job.workload).create_optimizer is Workload.create_optimizer:
        unused = set.intersection(*(train.unused for train in trials))
    if not any(train.reproducible for train in trials):
        unused |= {"num_chunks"}
    for name in sorted(unused & {*space.spaces, *job.given}):
        raise UsageError(f"{settings.flag(name)} has no effect: no trial uses it; leave it out")


def check_sweep(sweep: Sweep, data: Splits) -> Sweep:
    """Return the sweep with notes about its data, and with a space that fits them. Raises UsageError if none does."""
    job = check_against_data(sweep.job, data, sweep.batch_sizes)
    for name, about in settings.declared(type(job.workload.settings)).items():
        if name in sweep.space.spaces and about.decides_data:
            raise UsageError(f"--sweep {name}: load_data depends on it, and all trials have the same data")
    if len(data.validation) == 0:
        monitor = job.workload.monitor.name
        remedy = "leave --validation-size 0 and --overfit-batches out"
        raise UsageError(f"a sweep chooses by validation {monitor}, but no examples are held out: {remedy}")
    space = sweep.space.up_to(len(data.train), "batch_size") if sweep.batch_sizes else sweep.space
    config = dataclasses.replace(sweep.config, sweep=sweep.config.sweep or space.texts())
    return Sweep(config, space, job, len(data.validation))


def tune(sweep: Sweep) -> Sweep:
    """Search, then train, evaluate and report the best; return the sweep as it was run. Raises like ``train``."""
    if sweep.job.is_finished:
        say_result(SweepConsole(sweep), sweep.job)
        return sweep
    with started(sweep.job, "mnist_ray.sweep.trial", sweep.workers) as start:
        data = load_splits(sweep.job)
        sweep = check_sweep(sweep, data)
        console = SweepConsole(sweep)
        say_header = functools.partial(say_sweep, console, sweep, data)
        with opened(start, sweep.job, data, console, say_header, sweep.batch_sizes) as session:
            from mnist_ray.run.fit import check_nodes_for  # torch is loaded by now
            from mnist_ray.sweep.search import plan_trials, search, train_chosen

            if idle := sorted((session.own_unused or set()) & {*sweep.space.spaces}):
                own = f"{type(sweep.job.workload).__name__}'s loss, optimizer and schedule"
                raise UsageError(f"--sweep {idle[0]} has no effect: {own} do not use it; leave it out")
            plan, concurrent = plan_trials(session, sweep)
            if sweep.job.output.dry_run:
                check_nodes_for(session, plan)
                return sweep
            table = search(session, sweep, plan, concurrent, console.show_table)
            console.show_result(table)
            train_chosen(session, sweep, plan, table)
    return sweep


def say_sweep(console: RunConsole, sweep: Sweep, data: Splits) -> None:
    """Print the header of a sweep."""
    job, config = sweep.job, sweep.config
    console.say("sweep", job.run.name)
    say_data(console, job, data)
    points = {*propose(sweep.space, config, job.train.seed)}  # Optuna tries at most this many
    trials = f"{count(len(points), 'trial')} of {count(job.train.num_epochs, 'epoch')}"
    best = min(config.num_confirmed, len(points))
    also = best < len(points) and not points.isdisjoint(sweep.space.default_points(job.train.seed))
    if best + also > 1:
        trials += f", then the best {best}{' and the default' * also} with up to two more seeds"
    searched = " ".join(sweep.space.texts())
    console.say("search", f"{config.search_algorithm}, {trials}: {searched}; scheduler {config.scheduler}")
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")


class SweepConsole(RunConsole):
    """Prints a sweep: a table redrawn in place on a terminal; elsewhere, a line for each trial that ends."""

    def __init__(self, sweep: Sweep) -> None:
        job = sweep.job
        super().__init__(job.workload, job.train.num_epochs, quiet=job.output.quiet)

    def show_table(self, table: TrialTable, ended: TrialRecord | None = None) -> None:
        """Show the trials after one of them has ``ended`` or reported."""
        if self._live.is_started:
            self._live.update(Group(self._table(table), Text(self._summary(table))), refresh=True)
        elif ended is not None and ended.state != STOPPED:  # it had a line as "waiting"
            *_, epochs, monitor, _, state = self._row(table, ended, None)  # the summary names the best
            tried = f"{format_settings(ended.point.values)}, seed {ended.point.seed}: {table.workload.monitor.name}"
            line = f"{tried} {monitor} after {epochs} epochs, {state} · {self._summary(table)}"
            self.say(f"trial {ended.trial}", line)

    def show_result(self, table: TrialTable) -> None:
        """Print the whole table, sorted, and the epochs that stopping early has saved."""
        self.rest()
        if not self._quiet:
            self._console.print(self._table(table))
        trained = sum(record.epochs for record in table.by_point.values())
        full = self._num_epochs * len(table.by_point)
        self.say("epochs", f"{trained:.4g} trained; {full} if no trial had stopped early")

    def _table(self, table: TrialTable) -> Table:
        view = Table(box=None, padding=(0, 1, 0, 0))
        searched, metric, rate = map(in_words, table.space.spaces), table.workload.monitor.name, table.workload.nouns
        for column in ("trial", *searched, "seed", "epochs", metric, f"{rate}/s", "state"):
            view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
        best = find_best(table)
        for record in ranked(table):
            view.add_row(*map(redact, self._row(table, record, best)))
        return view

    def _row(self, table: TrialTable, record: TrialRecord, best: Averaged | None) -> tuple[str, ...]:
        is_best = best is not None and record.point.values == best.point.values
        return (
            str(record.trial),
            *map(format_value, record.point.values.values()),
            str(record.point.seed),
            f"{record.epochs:.3g}/{self._num_epochs}",
            table.workload.monitor.format(record.val_monitor),
            "-" if math.isnan(record.rate) else f"{record.rate:,.0f}",
            record.state + (f": {record.reason}" if record.reason else "") + (" · best" if is_best else ""),
        )

    def _summary(self, table: TrialTable) -> str:
        counts = {"done": table.count(DONE), STOPPED: table.count(STOPPED), "failed": table.count(FAILED, LOST)}
        text = ", ".join(f"{number} {state}" for state, number in counts.items() if number or state == "done")
        if best := find_best(table):
            text += f"; best {table.workload.monitor.format(best.val_monitor)} ({best.seeds_text})"
        return text
