"""The search on a connected Ray, the choice of the best configuration, and the training of that."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from mnist_ray import settings
from mnist_ray.cluster.connect import as_it_is_now
from mnist_ray.cluster.plan import plan_workers
from mnist_ray.cluster.remote_data import share
from mnist_ray.cluster.watch import orphans_removed
from mnist_ray.errors import JobError, count, format_settings
from mnist_ray.run.fit import fit
from mnist_ray.run.job import Job
from mnist_ray.run.record import begin_files, recorded
from mnist_ray.run.record import check as check_run
from mnist_ray.run.session import Clock, Session, console_of, say_dashboard, say_run
from mnist_ray.settings import json_lines
from mnist_ray.storage import RESULT_FILE, SWEEP_FILE, TRIALS_FILE
from mnist_ray.sweep.options import BEST_FILE, DEFAULT_FOLDER, Sweep
from mnist_ray.sweep.trial import TrialSpec
from mnist_ray.sweep.trials import FAILED, Best, TrialRecord, TrialTable
from mnist_ray.sweep.tuner import TRIALS_FOLDER, OnChange, run_sweep, trials_at_a_time
from mnist_ray.trackers import start
from mnist_ray.trackers.tracker import Ending
from mnist_ray.training.events import TrialEnded

PICTURE_FILE = "sweep.png"


def check(session: Session, sweep: Sweep) -> None:
    """Say how a sweep would run, and whether it would. Raises JobError if it would not."""
    _say_plan(session, sweep)
    check_run(session)


def search(session: Session, sweep: Sweep, show: OnChange) -> TrialTable:
    """Run the trials, except those that an interrupted sweep has finished, and ``show`` them.

    A sweep that has chosen before tries nothing more: its choice is not to change. Raises JobError.
    """
    job, data, run = sweep.job, session.data, sweep.job.run
    begin_files(session, SWEEP_FILE, {**settings.values_of(sweep.config), **job.values})
    splits = share(job.workload, data.train), share(job.workload, data.validation)
    spec = TrialSpec(job, *splits, session.plan, run.inside(TRIALS_FOLDER))
    concurrent = _say_plan(session, sweep)
    if run.exists(BEST_FILE):
        return sweep.table()
    warn = functools.partial(session.console.say, "note")
    trackers = start.start_trials(run, job.workload, settings.values_of(sweep.config), job.output, warn)

    def on_change(table: TrialTable, ended: TrialRecord | None) -> None:
        show(table, ended)
        if ended is not None:
            trackers.log(_event_of(table, ended))

    try:
        with orphans_removed():  # of trials that are stopped before their end
            return run_sweep(sweep, spec, concurrent, on_change)
    except JobError as error:
        raise JobError(f"{error} (logs: {session.cluster.log_folder})") from error
    finally:
        trackers.close(Ending(None, {}, None))


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


def _event_of(table: TrialTable, record: TrialRecord) -> TrialEnded:
    outcome = table.outcome(record).items()
    values = {name: value for name, value in outcome if isinstance(value, float) and not math.isnan(value)}
    point = {**record.point.values, "seed": record.point.seed}
    return TrialEnded(record.trial, point, record.state, record.state == FAILED, values)


def train_chosen(session: Session, sweep: Sweep, table: TrialTable) -> None:
    """Write the best configuration; train and evaluate it, after the default, if that is another and fits the data.

    What an interrupted sweep has trained already is not trained again.
    """
    from mnist_ray.sweep import picture  # imports matplotlib, which the trials need not wait for

    assert table.best is not None
    console, run, monitor = session.console, sweep.job.run, sweep.job.workload.monitor
    best = _write_best(sweep, table.best)
    run.write_bytes(PICTURE_FILE, picture.draw(table, sweep.job.train.num_epochs))
    console.say("files", f"{run.inside(TRIALS_FILE).uri}, {BEST_FILE}, {PICTURE_FILE}")
    mean = monitor.format(table.best.val_monitor)
    console.say("best", f"{mean} validation {monitor.name}, {table.best.seeds_text}")
    default = best.with_values(dict(sweep.space.defaults))
    default = dataclasses.replace(default, run=run.inside(DEFAULT_FOLDER))
    is_default = default.values == best.values
    is_too_large = default.train.batch_size > len(session.data.train)
    came_out = {}
    for title, job in {"default": default, "best": best}.items():
        if title == "default" and (is_default or is_too_large):
            continue
        values = format_settings({name: job.values[name] for name in sweep.space.spaces})
        console.say("", "")
        console.say(title, f"training with {values}")
        value = _known_result(job)
        if value is None:
            value = train_and_test(session, job, picture.sections, is_last=title == "best")
        name = "" if monitor.is_fraction else f"{monitor.name} "
        end = ", the default" if is_default else ""
        came_out[title] = f"{name}{monitor.format(value)} on the test set with {values}{end}"
    console.say("", "")
    for title, line in came_out.items():
        console.result(title, line)


def _write_best(sweep: Sweep, best: Best) -> Job:
    """Write the best configuration; return the job that trains it."""
    job = sweep.job.with_values(dict(best.configuration))
    of_workers = settings.names_of([type(job.workers)])
    job.run.write_text(BEST_FILE, json_lines({name: job.values[name] for name in job.values if name not in of_workers}))
    return dataclasses.replace(job, notes=())  # they were shown as the sweep began


def _known_result(job: Job) -> float | None:
    """Return the result of a run that an interrupted sweep has finished already."""
    result = job.run.read_json(RESULT_FILE)
    value = (result or {}).get(f"test_{job.workload.monitor.name}")
    return value if isinstance(value, float) else None


def train_and_test(session: Session, job: Job, sections: Callable[..., Any], *, is_last: bool) -> float:
    """Do what ``jobs/train.py`` does; after the last run the cluster is left while the report is written."""
    run = copy.copy(session)
    run.job, run.clock, run.cluster = job, Clock(), as_it_is_now(session.cluster)
    run.plan = plan_workers(job.workers, run.cluster, job.train.chunks)
    with console_of(job) as run.console:
        say_run(run)
        with recorded(run, functools.partial(sections, workload=type(job.workload))) as record:
            with orphans_removed():  # of the last trials
                fitted = fit(run, record.on_event)
            return record.test(fitted, is_last=is_last)
