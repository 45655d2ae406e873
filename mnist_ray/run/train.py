"""A training run, step by step."""

from mnist_ray.run.job import Job
from mnist_ray.run.session import Session, console_of, load_data, say_plan, say_run


def train(job: Job) -> None:
    """Load data, start Ray, train, test, report. Raises UsageError, JobError, KeyboardInterrupt with one-line texts."""
    with Session(job, "mnist_ray.run.fit") as session:
        job, data = load_data(job)
        session.begin(job, data, console_of(job), say_run)
        with session.ray():
            from mnist_ray.run import fit, in_process, record  # they import torch, which was loaded while Ray started

            fit.plan(session)
            if job.output.check:
                say_plan(session)
                record.check(session)
                return
            fit_run = in_process.fit_here if session.is_here else fit.fit
            with record.recorded(session) as this_run:  # however the run ends, a report is written
                this_run.test(fit_run(session, this_run.on_event))
