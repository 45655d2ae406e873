"""The story of a sweep."""

import contextlib

from mnist_ray.cluster import environment
from mnist_ray.cluster.forking.starting import prepared_forking
from mnist_ray.run.dry_run import dry_run
from mnist_ray.run.job import owning, saying_the_way_on
from mnist_ray.sweep.options import Sweep, load_data
from mnist_ray.sweep.progress import announced


def tune(sweep: Sweep) -> None:
    """Data, connect, search, then fit, evaluate and report the best. Raises as ``train`` does."""
    environment.prepare(verbose=sweep.job.output.verbose)
    with saying_the_way_on(sweep.job), contextlib.ExitStack() as sweep_ends:
        forking = sweep_ends.enter_context(prepared_forking(sweep.workers, "mnist_ray.sweep.tuner"))
        sweep, data = load_data(sweep)
        sweep.job.run.check_writable()
        console = sweep_ends.enter_context(announced(sweep, data))
        sweep_ends.enter_context(owning(sweep.job, console.waiting))

        from mnist_ray.cluster.connect import connect  # imports Ray, once the header is on the screen

        try_batch = dry_run(sweep.job, data, sweep.batch_sizes)
        output = {"verbose": sweep.job.output.verbose, "dashboard": sweep.job.output.dashboard}
        with connect(sweep.workers, forking, **output, meanwhile=try_batch) as cluster:
            from mnist_ray.sweep.search import check, search, train_chosen  # imports torch, which is there by now

            if sweep.job.output.check:
                check(console, sweep, cluster)
                return
            table = search(console, sweep, data, cluster)
            train_chosen(console, sweep, table, data, cluster)
