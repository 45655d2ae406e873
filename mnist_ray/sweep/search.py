"""A sweep on a connected Ray: the search, what it has chosen, and the training of that."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from mnist_ray import settings
from mnist_ray.cluster import preflight
from mnist_ray.cluster.connect import as_it_is_now
from mnist_ray.cluster.plan import plan_workers
from mnist_ray.cluster.remote_data import share
from mnist_ray.cluster.watch import orphans_removed
from mnist_ray.errors import JobError, count, format_settings
from mnist_ray.run.fit import fit
from mnist_ray.run.job import Job
from mnist_ray.run.record import check as check_run
from mnist_ray.run.record import recorded, write_origin
from mnist_ray.run.session import Clock, Session, console_of, say_dashboard, say_run
from mnist_ray.settings import json_lines
from mnist_ray.signals import if_ended
from mnist_ray.storage import TRIALS_FILE, RunFolder, read_result, unless_damaged
from mnist_ray.sweep.options import BEST_FILE, DEFAULT_FOLDER, SWEEP_FILE, Sweep
from mnist_ray.sweep.progress import SweepConsole
from mnist_ray.sweep.trial import TrialSpec
from mnist_ray.sweep.trials import FAILED, TrialRecord, TrialTable
from mnist_ray.sweep.tuner import TRIALS_FOLDER, run_sweep, trials_at_a_time
from mnist_ray.trackers import start
from mnist_ray.trackers.tracker import Ending
from mnist_ray.training.events import TrialEnded
from mnist_ray.workload.base import Workload

PICTURE_FILE = "sweep.png"


def check(session: Session, sweep: Sweep) -> None:
    """Say how a sweep would run, and whether it would. Raises JobError where it would not."""
    _say_plan(session, sweep)
    check_run(session)


def search(session: Session, sweep: Sweep, console: SweepConsole) -> TrialTable:
    """Run the trials, or those that an interrupted sweep has not run yet, and write what came of them.

    A sweep that has chosen before tries nothing more: its choice is not to change. Raises JobError.
    """
    job, data, plan, run = sweep.job, session.data, session.plan, sweep.job.run
    if len(session.cluster.nodes) > 1:  # else nobody but this machine writes
        preflight.check_nodes(run)
    write_origin(job, data)
    run.write_text(SWEEP_FILE, json_lines({**settings.values_of(sweep.config), **job.values}))
    spec = TrialSpec(
        job,
        share(job.workload, data.train),
        share(job.workload, data.validation),
        plan,
        run.inside(TRIALS_FOLDER),
    )
    if_ended(f"; to go on: {job.resume_with}")
    try:
        concurrent = _say_plan(session, sweep)
        table = chosen_before(sweep)
        if table is None:
            # What is left over is of trials that are stopped before their end.
            with orphans_removed(), followed(sweep, console) as on_change:
                table = run_sweep(sweep, spec, concurrent, on_change)
    except JobError as error:
        raise JobError(f"{error} (logs: {session.cluster.log_folder})") from error
    _write_choice(console, sweep, table)
    console.rest()
    return table


def chosen_before(sweep: Sweep) -> TrialTable | None:
    """Return the trials of a sweep that was interrupted after its choice."""
    run = sweep.job.run
    if not run.exists(BEST_FILE):
        return None
    return TrialTable(type(sweep.job.workload), sweep.space).read(run)


def _write_choice(console: SweepConsole, sweep: Sweep, table: TrialTable) -> None:
    """Write and print the best configuration, with all trials."""
    from mnist_ray.sweep.picture import draw  # imports matplotlib, which the trials need not wait for

    job, best = sweep.job, table.best
    assert best is not None
    chosen = {
        name: value for name, value in _best_job(sweep, table).values.items() if name not in _worker_settings(job)
    }
    job.run.write_text(BEST_FILE, json_lines(chosen))
    job.run.write_bytes(PICTURE_FILE, draw(table, job.train.num_epochs))
    console.result_table(table)
    console.say("files", f"{job.run.inside(TRIALS_FILE).uri}, {BEST_FILE}, {PICTURE_FILE}")
    monitor = job.workload.monitor
    console.say("best", f"{monitor.format(best.val_monitor)} validation {monitor.name}, {best.seeds_text}")


def _worker_settings(job: Job) -> set[str]:
    return settings.names_of([type(job.workers)])


def _best_job(sweep: Sweep, table: TrialTable) -> Job:
    assert table.best is not None
    job = sweep.job.with_values(dict(table.best.configuration))
    return dataclasses.replace(job, notes=())  # they were shown as the sweep began


def train_chosen(session: Session, sweep: Sweep, table: TrialTable) -> None:
    """Train and evaluate the default configuration, where it is another one and fits the data, and the best.

    What an interrupted sweep has trained already is not trained again.
    """
    best, console = _best_job(sweep, table), session.console
    default = best.with_values(dict(sweep.space.defaults))
    default = dataclasses.replace(default, run=best.run.inside(DEFAULT_FOLDER))
    chosen = {"default": default, "best": best}
    is_default = default.values == best.values
    if is_default or default.train.batch_size > len(session.data.train):
        del chosen["default"]
    came_out = {}
    for title, job in chosen.items():
        values = format_settings({name: job.values[name] for name in sweep.space.spaces})
        console.say("", "")
        console.say(title, f"training with {values}")
        value = _known_result(job)
        if value is None:
            value = _train_and_test(session, job, is_last=title == "best")
        shown = job.workload.monitor.format(value)
        name = "" if job.workload.monitor.is_fraction else f"{job.workload.monitor.name} "
        came_out[title] = f"{name}{shown} on the test set with {values}" + (", the default" if is_default else "")
    console.say("", "")
    for title, line in came_out.items():
        console.result(title, line)


def _train_and_test(session: Session, job: Job, *, is_last: bool) -> float:
    """Do what ``jobs/train.py`` does; after the last run the cluster is left while the report is written."""
    run = copy.copy(session)
    run.job, run.clock, run.cluster = job, Clock(), as_it_is_now(session.cluster)
    run.plan = plan_workers(job.workers, run.cluster, job.train.chunks)
    sections = functools.partial(_sections, workload=job.workload)
    with console_of(job) as run.console:
        say_run(run)
        with recorded(run, sections) as record:
            with orphans_removed():  # of the last trials
                fitted = fit(run, record.on_event)
            return record.test(fitted, is_last=is_last)


def _known_result(job: Job) -> float | None:
    """Return what came out of a run that an interrupted sweep has finished already."""
    result = unless_damaged(lambda: read_result(job.run), lambda note: None)
    value = (result or {}).get(f"test_{job.workload.monitor.name}")
    return value if isinstance(value, float) else None


def _sections(run: RunFolder, workload: Workload) -> Any:
    from mnist_ray.sweep.picture import sections  # imports matplotlib, which the trials need not wait for

    return sections(run, type(workload))


def _say_plan(session: Session, sweep: Sweep) -> int:
    """Say how many trials run at a time, and return it."""
    console, plan, autoscaling = session.console, session.plan, sweep.job.workers.autoscaling
    concurrent = trials_at_a_time(sweep.config, plan, session.cluster, autoscaling=autoscaling)
    each = f"{count(plan.num_workers, 'worker')} with {count(plan.cpus_per_worker, 'CPU')}"
    if sweep.job.output.dashboard:
        say_dashboard(console, session.cluster)
    console.say("trials", f"{concurrent} at a time, each {each}{' and 1 GPU' if plan.use_gpu else ''}")
    console.waiting("starting trials …")
    return concurrent


@contextlib.contextmanager
def followed(sweep: Sweep, console: SweepConsole) -> Iterator[Callable[[TrialTable], None]]:
    """Yield what is to be told of the trials whenever they have changed: it shows them, and tells the trackers."""
    job, reported = sweep.job, set[int]()
    warn = functools.partial(console.say, "note")
    trackers = start.start_trials(job.run, job.workload, settings.values_of(sweep.config), job.output, warn)

    def on_change(table: TrialTable) -> None:
        console.show_table(table)
        for record in table.by_point.values():
            if record.is_finished and record.trial not in reported:
                reported.add(record.trial)
                trackers.log(_ended(table, record))

    try:
        yield on_change
    finally:
        trackers.close(Ending(None, {}, None))


def _ended(table: TrialTable, record: TrialRecord) -> TrialEnded:
    outcome = table.outcome(record).items()
    values = {name: value for name, value in outcome if isinstance(value, float) and not math.isnan(value)}
    point = {**record.point.values, "seed": record.point.seed}
    return TrialEnded(record.trial, point, record.state, record.state == FAILED, values)
