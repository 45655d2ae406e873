"""The story of a training run."""

import contextlib

from mnist_ray.cluster import environment
from mnist_ray.cluster.forking.starting import prepared_forking
from mnist_ray.cluster.plan import plan_workers
from mnist_ray.run.dry_run import dry_run
from mnist_ray.run.header import Clock, announced
from mnist_ray.run.job import Job, load_data, owning, saying_the_way_on


def train(job: Job) -> None:
    """Data, connect, fit, evaluate, report. Raises UsageError, JobError and KeyboardInterrupt, each in one line."""
    clock = Clock()
    environment.prepare(verbose=job.output.verbose)
    with saying_the_way_on(job), contextlib.ExitStack() as job_ends:
        forking = job_ends.enter_context(prepared_forking(job.workers, "mnist_ray.run.fit"))
        clock.mark("start")
        job, data = load_data(job)
        job.run.check_writable()
        clock.mark("data")
        console = job_ends.enter_context(announced(job, data))
        job_ends.enter_context(owning(job, console.waiting))

        from mnist_ray.cluster.connect import connect  # imports Ray, once the header is on the screen

        try_batch = dry_run(job, data)
        output = {"verbose": job.output.verbose, "dashboard": job.output.dashboard}
        with connect(job.workers, forking, **output, meanwhile=try_batch) as cluster:
            from mnist_ray.run.evaluate import evaluate  # imports torch, which is there by now
            from mnist_ray.run.fit import fit
            from mnist_ray.run.session import check, recorded

            plan = plan_workers(job.workers, cluster, job.train.chunks)
            if job.output.check:
                check(console, job, cluster, plan)
                return
            with recorded(console, job, data, cluster, plan, clock) as record:  # writes a report however the run ends
                fitted = fit(job, data, plan, record.on_event)
                clock.mark("validation")
                tested = evaluate(job.workload, fitted.checkpoint, data.test, loader_workers=job.workers.loader_workers)
                clock.mark("evaluation")
                cluster.leave()
                record.finish(fitted, tested)
