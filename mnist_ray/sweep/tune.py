"""The story of a sweep."""

import functools

from mnist_ray.run.session import Session
from mnist_ray.run.train import dry_run
from mnist_ray.sweep.options import Sweep, load_data
from mnist_ray.sweep.progress import SweepConsole, say_sweep


def tune(sweep: Sweep) -> None:
    """Data, Ray, search, then fit, evaluate and report the best. Raises as ``train`` does."""
    with Session(sweep.job, sweep.workers, "mnist_ray.sweep.tuner") as session:
        sweep, data = load_data(sweep)
        console = SweepConsole(sweep)
        session.begin(sweep.job, data, console, functools.partial(say_sweep, sweep))
        with session.ray(meanwhile=dry_run(sweep.job, data, sweep.batch_sizes)):
            from mnist_ray.sweep.search import check, search, train_chosen  # imports torch, which is there by now

            if sweep.job.output.check:
                check(session, sweep)
                return
            train_chosen(session, sweep, search(session, sweep, console))
