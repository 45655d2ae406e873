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
from unittest.mock import patch

from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from mnist_ray.cluster import environment
from mnist_ray.cluster.connect import connect
from mnist_ray.cluster.plan import plan_workers
from mnist_ray.cluster.remote_data import share
from mnist_ray.job.job_data import load_splits
from mnist_ray.run.worker import LoopSpec
from mnist_ray.storage import locate
from mnist_ray.sweep import trial, tuner
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trials import DONE
from mnist_ray.sweep.tune import check_sweep, read_sweep


def naive_trial(tune_config: dict[str, Any], spec: trial.TrialSpec) -> None:
    """Train one point with a new TorchTrainer of one worker."""
    seed = tune_config.pop("seed")
    job = spec.job.with_values({**tune_config, "seed": seed})
    folder = spec.folder.inside(Point(tuple(tune_config.items()), seed).name)
    job = dataclasses.replace(job, run=folder)
    trial.train_on_workers(LoopSpec(job=job, train=spec.train, validation=spec.validation, is_trial=True), spec.plan)


def naive_sweep(points: list[Point], spec: trial.TrialSpec, storage: str, concurrent: int) -> int:
    """Run every point by ``naive_trial``; return how many finished."""
    presets = [{**point.values, "seed": point.seed} for point in points]
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(naive_trial, spec=spec), tune.PlacementGroupFactory([{"memory": 2**20}])),
        param_space=dict.fromkeys(presets[0]),
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(points_to_evaluate=presets, max_concurrent=concurrent),
            num_samples=len(points),
        ),
        run_config=tune.RunConfig(name="naive", storage_path=storage, verbose=0),
    )
    return sum(result.error is None for result in tuner.fit())


def main() -> None:
    """Run both sweeps and print their seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=16)
    parser.add_argument(
        "--num-naive-trials", type=int, default=8, help="how many of the same trials the naive sweep runs"
    )
    parser.add_argument("--json", action="store_true", help="print the seconds as JSON")
    args = parser.parse_args()
    environment.prepare(verbose=False)
    with tempfile.TemporaryDirectory() as storage:
        flags = ["--num-trials", str(args.num_trials), "--scheduler", "none", "--num-confirmed", "0"]
        where = ["--num-epochs", "1", "--storage-path", storage, "--run-name", "ours"]
        with patch("sys.argv", ["jobs/tune.py", *flags, *where]):
            asked = read_sweep()
            data = load_splits(asked.job)
            asked = check_sweep(asked, data)
        job = asked.job
        with connect(asked.workers) as cluster:
            plan = plan_workers(asked.workers, cluster)
            concurrent = tuner.trials_at_a_time(asked.config, plan, cluster, autoscaling=False)
            shared = share(job.workload, data.train), share(job.workload, data.validation)
            spec = trial.TrialSpec(job, *shared, plan, job.run.inside("trials"))
            start = time.perf_counter()
            table = tuner.run_sweep(asked, spec, concurrent, lambda table, ended: None, print)
            ours_s = time.perf_counter() - start
            bound_s = sum(record.train_s for record in table.by_point.values()) / concurrent
            assert table.count(DONE) == args.num_trials

            naive = dataclasses.replace(spec, folder=locate(storage, "naive"))
            start = time.perf_counter()
            naive_points = list(table.by_point)[: args.num_naive_trials]
            finished = naive_sweep(naive_points, naive, storage, concurrent)
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
