"""A training run, step by step."""

import functools

from mnist_ray.job.job import Job
from mnist_ray.job.job_data import check_against_data, load_splits
from mnist_ray.job.session import console_of, opened, started
from mnist_ray.record.header import say_result, say_run


def train(job: Job) -> None:
    """Load data, start Ray, train, test, report.

    Raises UsageError, JobError, KeyboardInterrupt with one-line texts.
    """
    if job.is_finished:
        say_result(console_of(job), job)
        return
    with started(job, preload="mnist_ray.run.fit") as start:
        data = load_splits(job)
        job = check_against_data(job, data)
        console = console_of(job)
        with opened(start, job, data, console, functools.partial(say_run, console, job, data)) as session:
            from mnist_ray.record import recorder  # these import torch, which was loaded while Ray started
            from mnist_ray.run import evaluate, fit, in_process, rehearsal

            plan = fit.plan(session)
            if job.output.dry_run:
                rehearsal.check(session, plan)
                return
            fit_run = in_process.fit_here if session.is_here else fit.fit
            with recorder.recorded(session, plan) as record:  # writes a report however the run ends
                fitted = fit_run(session, plan, record.on_event)
                evaluate.evaluate_fitted(session, plan, record, fitted)
