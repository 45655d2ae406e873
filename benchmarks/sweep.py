"""What a sweep costs beside its training, and against a naive one: python benchmarks/sweep.py

Sixteen one-epoch trials of one worker each, as `jobs/tune.py` runs them, and the first eight of them as a sweep that
starts a `TorchTrainer` for every trial. The points, the engine, the recipe and the trials at a time are the same. The
bound is the sum of the trials' training seconds over the trials at a time: nothing that trains them can be faster.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from mnist_ray import environment
from mnist_ray.cluster import connection as cluster
from mnist_ray.config import SweepConfig, WorkerConfig, build_job
from mnist_ray.runs.launch import about, load_images
from mnist_ray.storage import locate
from mnist_ray.sweeps import search, sweep, trial


def naive_trial(tune_config: dict[str, Any], spec: trial.TrialSpec) -> None:
    """Train one point with a TorchTrainer of its own, of one worker."""
    point = search.Point(**tune_config)
    trial._train_on_workers(point.applied_to(spec.config), spec, locate(spec.storage_path, point.name))


def naive_sweep(points: list[search.Point], spec: trial.TrialSpec, storage: str, concurrent: int) -> int:
    """Run every point by ``naive_trial``; return how many finished."""
    presets = [vars(point) for point in points]
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
    parser.add_argument("--num-naive-trials", type=int, default=8, help="the first of the same trials")
    parser.add_argument("--json", action="store_true", help="print the seconds for a program")
    args = parser.parse_args()
    environment.prepare(verbose=False)
    config = SweepConfig(num_trials=args.num_trials, scheduler="none", num_confirmed=0)
    job = build_job({"num_epochs": 1})
    images = load_images(job)
    workers = WorkerConfig(num_workers=1, cpus_per_worker=1)
    with cluster.connect(workers, verbose=False) as ray_cluster, tempfile.TemporaryDirectory() as storage:
        plan = cluster.plan_workers(workers, ray_cluster)
        concurrent = sweep.trials_at_a_time(config, plan, ray_cluster, autoscaling=False)
        images_in_store = ray.put(images.train), ray.put(images.validation)
        ours = locate(storage, "ours")
        told = about(job), workers.hang_timeout_s
        spec = trial.TrialSpec(job.train, *images_in_store, plan, ours.inside("trials").uri, *told)
        start = time.perf_counter()
        table = sweep.run_sweep(config, spec, ours, concurrent, lambda table: None)
        ours_s = time.perf_counter() - start
        bound_s = sum(record.train_s for record in table.by_point.values()) / concurrent
        assert table.count(search.DONE) == args.num_trials

        spec = trial.TrialSpec(job.train, *images_in_store, plan, str(Path(storage) / "naive"), *told)
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
