"""A job from start to end, for ``train`` and ``tune``: one run or many. Imports neither torch nor Ray at the top."""

from __future__ import annotations

import dataclasses

from mnist_ray import settings
from mnist_ray.cluster.environment import prepared
from mnist_ray.config import SweepConfig
from mnist_ray.data.data import Data, Splits
from mnist_ray.errors import UsageError
from mnist_ray.job import rules
from mnist_ray.job.job import Job, read_job
from mnist_ray.job.session import Clock, Session, console_of, ending_explained, opened
from mnist_ray.many.console import ManyConsole
from mnist_ray.many.points import space_of
from mnist_ray.many.table import Many
from mnist_ray.record.header import say_data, say_plan, say_result, say_run
from mnist_ray.report.console import RunConsole
from mnist_ray.settings import Given
from mnist_ray.signals import take_signals
from mnist_ray.text import count
from mnist_ray.workload.calls import data_of, splits_for


def read_train(given: Given | None = None) -> Many:
    """Read ``given``, or the command line of ``jobs/train.py``. Raises UsageError, and JobError for damaged files."""
    job = read_job(given)
    return Many(_with_workers_of_many(job) if job.train.is_several else job)


def read_sweep(given: Given | None = None) -> Many:
    """Read ``given``, or the command line of ``jobs/tune.py``. Raises UsageError, and JobError for damaged files."""
    job = _with_workers_of_many(read_job(given, "tune"))
    config = settings.build(SweepConfig, job.asked)
    space = space_of(type(job.workload), job.asked, fixed=job.given)
    many = Many(job, space, config)
    jobs = [job.with_values(dict(each)) for each in many.configurations]  # raises if settings contradict each other
    rules.check_used(jobs, {*space.spaces, *job.given})
    many.table()  # raises if it is damaged
    return many


def _with_workers_of_many(job: Job) -> Job:
    return dataclasses.replace(job, workers=job.workers.of_many)


def check_data(many: Many, data: Splits) -> Many:
    """Return the job with notes about its data, and with a search space that fits them. Raises UsageError."""
    job = rules.check_against_data(many.job, data, many.batch_sizes)
    if not many.is_sweep:
        return dataclasses.replace(many, job=job)
    for name, about in settings.declared(type(job.workload.settings)).items():
        if name in many.space.spaces and about.decides_data:
            raise UsageError(f"--sweep {name}: load_data depends on it, and all trials have the same data")
    if len(data.validation) == 0:
        monitor = job.workload.monitor.name
        remedy = "leave --validation-size 0 and --overfit-batches out"
        raise UsageError(f"a sweep chooses by validation {monitor}, but no examples are held out: {remedy}")
    space = many.space.up_to(len(data.train), "batch_size") if many.batch_sizes else many.space
    config = dataclasses.replace(many.config, sweep=many.config.sweep or space.texts())
    return Many(job, space, config, len(data.validation))


def run(many: Many) -> Many:
    """Load the data, start Ray, train and test one run or many, report; return the job as it was run.

    If the job is interrupted and resumed, it does only what is missing. Raises UsageError, JobError,
    KeyboardInterrupt with one-line texts.
    """
    job, is_single = many.job, not many.is_sweep and not many.job.train.is_several
    if job.is_finished:
        say_result(console_of(job), job)
        return many
    clock = Clock()
    preload = "mnist_ray.run.fit" if is_single else "mnist_ray.many.run"
    environment = prepared(job.workers, preload, verbose=job.output.verbose, batch_size=job.train.batch_size)
    with ending_explained(job), environment as forking:
        clock.mark("start")
        data = data_of(job.workload)
        splits = splits_for(job.workload, data, job.train)
        many = check_data(many, splits)
        job = many.job
        console = console_of(job) if is_single else ManyConsole(many)
        take_signals()  # again: the user's code may have handlers of its own
        job.run.check_writable()
        clock.mark("data")
        with console:
            say_header(console, many, splits)
            with opened(forking, job, splits, console, clock, preload, many.batch_sizes) as session:
                _train_or_check(session, many, data)
    return many


def _train_or_check(session: Session, many: Many, data: Data) -> None:
    """Train one run or many; with ``--dry-run``, only check whether that is possible."""
    from mnist_ray.run import fit  # torch was loaded while Ray started

    plan = fit.plan(session)
    if session.job.output.dry_run:
        say_plan(session, plan)
        fit.check_nodes_for(session, plan)
    elif many.is_sweep or session.job.train.is_several:
        from mnist_ray.many.run import train_many

        train_many(session, plan, many, data)
    else:
        fit.train_run(session, plan)


def say_header(console: RunConsole, many: Many, splits: Splits) -> None:
    """Print the header of a job: of one run, or of many."""
    job, config = many.job, many.config
    if many.is_sweep:
        console.say("sweep", job.run.name)
        say_data(console, job, splits)
        trials = f"{count(len(many.configurations), 'trial')} of {count(job.train.num_epochs, 'epoch')}"
        searched = " ".join(many.space.texts())
        console.say("search", f"{config.search_algorithm}, {trials}: {searched}; scheduler {config.scheduler}")
        console.say("results", job.run.uri)
        console.waiting("starting Ray …")
    else:
        say_run(console, job, splits)
    if job.train.is_several:
        folds = f" and {job.train.folds} folds" if job.train.is_folded else ""
        of_each = " of each configuration" if many.is_sweep else ""
        console.say("runs", f"{len(many.points(())):,}{of_each}: {count(job.train.num_seeds, 'seed')}{folds}")
