"""The story of a training run."""

from mnist_ray.run.dry_run import dry_run
from mnist_ray.run.job import Job
from mnist_ray.run.session import Session, load_data, say_plan


def train(job: Job) -> None:
    """Data, Ray, fit, evaluate, report. Raises UsageError, JobError and KeyboardInterrupt, each in one line."""
    with Session(job) as session:
        session.begin(*load_data(job))
        with session.ray(meanwhile=dry_run(session.job, session.data)):
            from mnist_ray.run.fit import fit  # imports torch, which is there by now
            from mnist_ray.run.in_process import fit_here
            from mnist_ray.run.record import check, recorded

            if job.output.check:
                say_plan(session)
                check(session)
                return
            with recorded(session) as record:  # writes a report however the run ends
                record.test((fit_here if session.is_here else fit)(session, record.on_event))
