"""Compare the time of a sweep with its training alone, and with a naive sweep.

    python benchmarks/sweep.py     # about 4 minutes on two cores

Guards the speed of sweeps: they take little longer than their training, and a trial takes a fraction of one that starts
a `TorchTrainer`. bench.py has the targets.

Runs sixteen one-epoch trials of one worker each, like `jobs/tune.py`; then the first eight of them as a naive sweep,
which starts a `TorchTrainer` for every trial. Points, engine, recipe and concurrency are the same. The lower bound is
the trials' total training seconds divided by the number of trials at a time.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from typing import Any

import ray
from ray import tune

from mnist_ray.cluster import environment
from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.plan import plan_workers
from mnist_ray.config import WorkerConfig
from mnist_ray.many.executor import MemberSpec, QuietConsole, at_a_time, train_members
from mnist_ray.many.jobs import check_data, read_sweep
from mnist_ray.many.points import Point
from mnist_ray.report.run_files import DONE
from mnist_ray.run.fit import train_run
from mnist_ray.workload.calls import data_of, splits_for


def naive_trial(tune_config: dict[str, Any], points: list[Point], spec: MemberSpec) -> None:
    """Train one point with a new TorchTrainer of one worker."""
    job = spec.many.member(points[tune_config["number"]])
    job = dataclasses.replace(job, run=spec.many.job.run.inside("naive").inside(job.run.name))
    session = spec.session(job, QuietConsole(job), ray.get(spec.stored))
    train_run(dataclasses.replace(session, workers=job.workers), spec.plan, is_tested=False)


def naive_sweep(points: list[Point], spec: MemberSpec, storage: str, concurrent: int) -> int:
    """Run every point by ``naive_trial``; return how many finished."""
    train = functools.partial(naive_trial, points=points, spec=spec)
    tuner = tune.Tuner(
        tune.with_resources(train, tune.PlacementGroupFactory([{"memory": 2**20}])),
        param_space={"number": tune.grid_search([*range(len(points))])},  # Tune would take a point apart
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="naive", storage_path=storage, verbose=0),
    )
    return sum(result.error is None for result in tuner.fit())


def main() -> None:
    """Run both sweeps and print their seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=16)
    parser.add_argument("--num-naive-trials", type=int, default=8, help="how many of them the naive sweep runs")
    parser.add_argument("--json", action="store_true", help="print the seconds as JSON")
    args = parser.parse_args()
    with environment.prepared(WorkerConfig()) as forking, tempfile.TemporaryDirectory() as storage:
        few = {"num_trials": args.num_trials, "scheduler": "none", "num_confirmed": 0, "num_epochs": 1}
        many = read_sweep({**few, "storage_path": storage, "run_name": "ours"})
        data = data_of(many.job.workload)
        many = check_data(many, splits_for(many.job.workload, data, many.job.train))
        with Connection(many.job.workers, forking).opened(print) as cluster:
            plan = plan_workers(many.job.workers, cluster)
            concurrent = at_a_time(many, plan, cluster)
            spec = MemberSpec(many, plan, cluster, None, ("benchmarks/sweep.py",), ray.put(data))
            start = time.perf_counter()
            table = train_members(spec, data, concurrent, lambda table, ended: None, print)
            ours_s = time.perf_counter() - start
            bound_s = sum(member.figures["train_s"] for member in table.members) / concurrent
            assert [member.state for member in table.members] == [DONE] * args.num_trials

            start = time.perf_counter()
            naive_points = list(table.by_point)[: args.num_naive_trials]
            finished = naive_sweep(naive_points, spec, storage, concurrent)
            naive_s = time.perf_counter() - start
            assert finished == len(naive_points)
    trial_s, naive_trial_s = ours_s / args.num_trials, naive_s / finished
    if args.json:
        figures = {"sweep_s": ours_s, "trials_s": bound_s, "sweep_trial_s": trial_s, "naive_trial_s": naive_trial_s}
        print(json.dumps(figures))
        return
    print(
        f"{args.num_trials} trials, {concurrent} at a time: {ours_s:.1f} s; training {bound_s:.1f} s, "
        f"ratio {ours_s / bound_s:.2f}; {trial_s:.1f} s a trial, naive {naive_trial_s:.1f} s, "
        f"ratio {trial_s / naive_trial_s:.2f}"
    )


if __name__ == "__main__":
    main()
