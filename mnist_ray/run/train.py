"""The story of a training run."""

import importlib
from collections.abc import Callable, Sequence

from mnist_ray.run.job import Job
from mnist_ray.run.session import Session, load_data, say_plan
from mnist_ray.workload.data import Splits


def train(job: Job) -> None:
    """Data, Ray, fit, evaluate, report. Raises UsageError, JobError and KeyboardInterrupt, each in one line."""
    with Session(job) as session:
        session.begin(*load_data(job))
        with session.ray(meanwhile=dry_run(session.job, session.data)):
            from mnist_ray.run import fit, in_process, record  # import torch, which is there by now

            if job.output.check:
                say_plan(session)
                record.check(session)
                return
            fit_run = in_process.fit_here if session.is_here else fit.fit
            with record.recorded(session) as this_run:  # writes a report however the run ends
                this_run.test(fit_run(session, this_run.on_event))


def dry_run(job: Job, data: Splits, batch_sizes: Sequence[int] = ()) -> Callable[[], None]:
    """Let one batch go through a job's workload; return what is left to do while Ray starts: that, and imports.

    A user's own workload is tried here and now, so that a mistake is said before anything is started. That of this
    package was tried when it was built: it need not be waited for. ``batch_sizes`` are those that a sweep tries. Raises
    UsageError.
    """

    def try_it() -> None:
        from mnist_ray.run.dry_run import try_batch  # imports torch: this is where it is first needed

        try_batch(job, data.train, batch_sizes)

    is_tried_now = not type(job.workload).__module__.startswith("mnist_ray.")
    if is_tried_now:
        try_it()

    def meanwhile() -> None:
        importlib.import_module("mnist_ray.run.fit")  # and Ray Train, of which ray.init imports nothing meanwhile
        if not is_tried_now:
            try_it()

    return meanwhile
