"""A sweep on a connected Ray: the search, the choice of the best configuration, and its training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

from mnist_ray import settings
from mnist_ray.checkpoints.state_file import DamagedCheckpointError, read_state
from mnist_ray.cluster.nodes import current_nodes
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.remote_data import share
from mnist_ray.errors import JobError, TrainingStoppedError, UsageError
from mnist_ray.job.job import Job
from mnist_ray.job.session import Clock, Session, console_of
from mnist_ray.record.header import say_run
from mnist_ray.record.recorder import logs_named, write_settings
from mnist_ray.run import fit
from mnist_ray.settings import json_lines
from mnist_ray.storage import (
    RESULT_FILE,
    SWEEP_FILE,
    SWEEP_PICTURE_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    RunFolder,
    in_one_line,
)
from mnist_ray.sweep.halving import error_of_fraction
from mnist_ray.sweep.ranking import find_best, result_of
from mnist_ray.sweep.trial import TrialSpec
from mnist_ray.sweep.trials import BEST_FILE, DEFAULT_FOLDER, FAILED, WAITING, Sweep, TrialRecord, TrialTable
from mnist_ray.sweep.tuner import OnChange, run_sweep, trials_at_a_time
from mnist_ray.text import count, format_settings
from mnist_ray.trackers import Ending, start
from mnist_ray.training.events import TrialEnded

_LARGE_ERROR = 0.01  # of the validation, as a fraction: smaller ones need no words


def search(session: Session, sweep: Sweep, plan: WorkerPlan, concurrent: int, show: OnChange) -> TrialTable:
    """Run and ``show`` the trials, except those that an interrupted sweep has finished. Raises JobError.

    ``plan``: the workers of a trial; ``concurrent``: the number of trials at a time. If the sweep has already chosen
    its best configuration, no trial is run, so that the choice does not change.
    """
    job, data, run = sweep.job, session.data, sweep.job.run
    write_settings(session, plan, SWEEP_FILE, {**settings.values_of(sweep.config), **job.values})
    run.check_subfolders(TRIALS_FOLDER)
    if run.exists(BEST_FILE):
        return sweep.table()
    train, validation = share(job.workload, data.train), share(job.workload, data.validation)
    spec = TrialSpec(job, train, validation, plan, run.inside(TRIALS_FOLDER))
    warn = functools.partial(session.console.say, "note")
    trackers = start.start(run, job.workload, settings.values_of(sweep.config), job.output, warn, for_trials=True)

    def on_change(table: TrialTable, ended: TrialRecord | None) -> None:
        show(table, ended)
        if ended is not None and ended.state != WAITING:
            trackers.log(_event_of(table, ended))

    try:
        with logs_named(session):
            return run_sweep(sweep, spec, concurrent, on_change, session.console.say)
    finally:
        trackers.close(Ending(None, {}, None))


def plan_trials(session: Session, sweep: Sweep) -> tuple[WorkerPlan, int]:
    """Return the workers of a trial, and the number of trials that run at a time; print both."""
    plan = fit.plan(session)
    console, autoscaling = session.console, sweep.job.workers.autoscaling
    concurrent = trials_at_a_time(sweep.config, plan, session.cluster, autoscaling=autoscaling)
    trial = f"{count(plan.num_workers, 'worker')} with {count(plan.cpus_per_worker, 'CPU')}"
    console.say("trials", f"{concurrent} at a time, each {trial}{' and 1 GPU' if plan.use_gpu else ''}")
    console.waiting("starting trials …")
    return plan, concurrent


def _event_of(table: TrialTable, record: TrialRecord) -> TrialEnded:
    outcome = table.outcome(record).items()
    values = {name: value for name, value in outcome if isinstance(value, float) and not math.isnan(value)}
    point = {**record.point.values, "seed": record.point.seed}
    return TrialEnded(record.trial, point, record.state, record.state == FAILED, values)


def train_chosen(session: Session, sweep: Sweep, trial_plan: WorkerPlan, table: TrialTable) -> None:
    """Write the best configuration. Train and test the default one, unless it is the best, and then the best one.

    What a trial or an interrupted sweep has already trained is not trained again.
    """
    best = _write_best(session, sweep, table)
    default = best.with_values(dict(sweep.space.defaults))
    default = dataclasses.replace(default, run=sweep.job.run.inside(DEFAULT_FOLDER))
    is_default = default.values == best.values
    jobs = {"best": best} if is_default else {"default": default, "best": best}
    tested = {title: _tested(session, sweep, trial_plan, table, title, job) for title, job in jobs.items()}
    session.console.say("", "")
    for title, result in tested.items():
        if result is not None:
            session.console.result(title, result + " (the default)" * is_default)


def _write_best(session: Session, sweep: Sweep, table: TrialTable) -> Job:
    """Write the best configuration and the plots, and report them; return the job that trains this configuration."""
    from mnist_ray.sweep import picture  # imports matplotlib, which must not delay the trials

    console, run, monitor, chosen = session.console, sweep.job.run, sweep.job.workload.monitor, find_best(table)
    assert chosen is not None
    best = dataclasses.replace(sweep.job.with_values(chosen.point.values), notes=())  # the sweep has shown the notes
    of_workers = settings.declared(type(best.workers))
    run.write_text(BEST_FILE, json_lines({name: best.values[name] for name in best.values if name not in of_workers}))
    run.write_bytes(SWEEP_PICTURE_FILE, picture.draw(table, sweep.job.train.num_epochs))
    console.say("files", f"{run.inside(TRIALS_FILE).uri}, {BEST_FILE}, {SWEEP_PICTURE_FILE}")
    console.say("best", f"{monitor.format(chosen.val_monitor)} validation {monitor.name}, {chosen.seeds_text}")
    number = sweep.num_validation
    fraction = (chosen.val_monitor * number + 1) / (number + 2)  # else 100 % of few would have no error
    if monitor.is_fraction and (error := error_of_fraction(fraction, number)) > _LARGE_ERROR:
        few = count(number, sweep.job.workload.noun)
        console.say(
            "note", f"on {few} of validation, configurations that differ by less than {error:.0%} may be as good"
        )
    return best


def _tested(
    session: Session, sweep: Sweep, trial_plan: WorkerPlan, table: TrialTable, title: str, job: Job
) -> str | None:
    """Train and test the best or the default configuration; return its result, or None if the default cannot train."""
    console, monitor, is_best = session.console, sweep.job.workload.monitor, title == "best"
    values = format_settings({name: job.values[name] for name in sweep.space.spaces})
    console.say("", "")
    console.say(title, values)
    value = (job.run.read_json(RESULT_FILE) or {}).get(f"test_{monitor.name}")
    if not isinstance(value, float):  # else an interrupted sweep has finished this training
        trial = result_of(table, sweep.space.point(job.values, job.train.seed))
        try:
            value = train_and_test(session, job, trial_plan, trial, is_last=is_best)
        except TrainingStoppedError as error:
            if is_best:
                raise
            console.say("note", f"the default cannot be trained: {error}")
            return None
    name = "" if monitor.is_fraction else f"{monitor.name} "
    return f"{name}{monitor.format(value)} on the test set with {values}"


def train_and_test(
    session: Session, job: Job, trial_plan: WorkerPlan, trial: TrialRecord | None, *, is_last: bool
) -> float:
    """Train and test a configuration like ``jobs/train.py``; return the monitored value on the test set.

    If ``trial`` has trained the configuration, its checkpoint is used. But the best one (``is_last``) must have the
    weights that ``jobs/train.py`` gives, so it is trained anew if trials have other workers or threads.
    """
    cluster, console = session.cluster, console_of(job)
    if not cluster.is_local:  # an autoscaler may have added or removed nodes
        cluster = dataclasses.replace(cluster, nodes=current_nodes())
    run = dataclasses.replace(session, job=job, workers=job.workers, console=console, clock=Clock(), cluster=cluster)
    try:
        plan = fit.plan(run)
    except UsageError as error:  # nodes are gone
        raise JobError(str(error)) from error
    if trial and (not is_last or plan == trial_plan or job.train.reproducible):
        _copy_checkpoint(session.job.run.inside(TRIALS_FOLDER).inside(trial.point.name), job.run)
    with console:
        say_run(console, job, session.data)
        return fit.train_run(run, plan, is_last=is_last)


def _copy_checkpoint(trial: RunFolder, run: RunFolder) -> None:
    """Copy a trial's last checkpoint, unless somebody has deleted it. A run that resumes from it trains nothing."""
    with in_one_line("the storage has failed"):
        for name in trial.checkpoint_names()[-1:]:
            with contextlib.suppress(DamagedCheckpointError, UsageError):
                for file in read_state(trial.inside(name))["sha256"]:  # state.json comes last
                    run.inside(name).write_files({file: [trial.inside(name).read_bytes(file) or b""]})
