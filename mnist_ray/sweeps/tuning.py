"""One sweep from settings to result: what ``jobs/tune.py`` does once its flags are read."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Mapping
from typing import Any

import ray

from mnist_ray import config as settings
from mnist_ray.cluster import preflight
from mnist_ray.cluster.connection import Cluster, WorkerPlan, connect, plan_workers
from mnist_ray.config import DataConfig, JobConfig, SweepConfig, TrainConfig, WorkerConfig
from mnist_ray.display.console import RunConsole, count
from mnist_ray.errors import JobError, UsageError
from mnist_ray.runs.launch import Clock, Images, about, load_images, open_run, print_data
from mnist_ray.runs.run import train_run
from mnist_ray.storage import RESULT_FILE, TRIALS_FILE, RunFolder
from mnist_ray.sweeps.console import SweepConsole
from mnist_ray.sweeps.search import Point, TrialTable, propose
from mnist_ray.sweeps.sweep import TRIALS_FOLDER, run_sweep, trials_at_a_time
from mnist_ray.sweeps.trial import TrialSpec

SWEEP_FILE, BEST_FILE, PICTURE_FILE = "sweep.json", "best.json", "sweep.png"
SWEEP_SETTINGS = (SweepConfig, TrainConfig, DataConfig, WorkerConfig)
"""What sweep.json holds."""


def tune_and_train(flags: Mapping[str, Any]) -> None:
    """Run a whole sweep, then train its best configuration and evaluate it once, beside the default's.

    Raises UsageError and JobError.
    """
    values, run = open_run(flags, "tune", SWEEP_FILE, SWEEP_SETTINGS)
    sweep, job = settings.build(SweepConfig, values), settings.build_job(values)
    any_batch_size = dataclasses.replace(job.train, batch_size=1)  # _check looks at those of the sweep
    images = load_images(dataclasses.replace(job, train=any_batch_size))
    _check(sweep, job, images)
    run.check_writable()
    workers = dataclasses.replace(
        job.workers,
        num_workers=job.workers.num_workers or 1,
        cpus_per_worker=job.workers.cpus_per_worker or 1,  # a core a trial: more trials at a time beat more threads
    )
    resume_with = run.resume_command("tune", job.output.mlflow)
    with connect(workers, verbose=job.output.verbose) as cluster:
        plan = plan_workers(workers, cluster)
        concurrent = trials_at_a_time(sweep, plan, cluster, autoscaling=job.workers.autoscaling)
        if job.output.check:
            with SweepConsole(sweep, job, concurrent) as console:
                _print_header(console, sweep, job, run, images, plan, concurrent)
                preflight.check_job(run, images.train, job.train.batch_size, plan, console.say)
            return
        preflight.check_storage(run)
        run.write_text(SWEEP_FILE, settings.json_lines(settings.values_of(sweep, job.train, job.data, job.workers)))
        try:
            with SweepConsole(sweep, job, concurrent) as console:
                _print_header(console, sweep, job, run, images, plan, concurrent)
                spec = TrialSpec(
                    job.train,
                    ray.put(images.train),
                    ray.put(images.validation),
                    plan,
                    run.inside(TRIALS_FOLDER).uri,
                    about(job),
                    workers.hang_timeout_s,
                )
                table = _chosen_before(run) or run_sweep(sweep, spec, run, concurrent, console.show_table)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"interrupted; to go on: {resume_with}") from interrupt
        except JobError as error:
            raise JobError(f"{error} (logs: {cluster.log_folder})") from error
        assert table.best is not None
        chosen = dataclasses.replace(table.best.records[0].point, seed=job.train.seed)
        best = dataclasses.replace(job, train=chosen.applied_to(job.train))
        run.write_text(BEST_FILE, settings.json_lines(settings.values_of(best.train, best.data)))
        from mnist_ray.display import pictures  # imports matplotlib, which the trials need not wait for

        run.write_bytes(PICTURE_FILE, pictures.sweep(table, job.train.num_epochs))
        console.result_table(table)
        console.say("files", f"{run.inside(TRIALS_FILE).uri}, {BEST_FILE}, {PICTURE_FILE}")
        seeds = count(len(table.best.records), "seed")
        console.say("best", f"{table.best.val_accuracy:.2%} validation accuracy, mean of {seeds}")
        _train_the_best(best, run, images, cluster.as_it_is_now(), resume_with)


def _chosen_before(run: RunFolder) -> TrialTable | None:
    """Return the trials of a sweep that was interrupted after its choice, which more trials are not to change."""
    return TrialTable.from_csv(run.read_text(TRIALS_FILE) or "") if run.exists(BEST_FILE) else None


def _check(sweep: SweepConfig, job: JobConfig, images: Images) -> None:
    """Check the settings against each other and the data. Raises UsageError."""
    if sweep.learning_rate_min >= sweep.learning_rate_max:
        raise UsageError(
            f"--learning-rate-min {sweep.learning_rate_min:g} must be below "
            f"--learning-rate-max {sweep.learning_rate_max:g}"
        )
    if job.train.validation_size == 0:
        raise UsageError("--validation-size 0: a sweep chooses by validation accuracy; hold some images out")
    if sweep.search == "grid":
        propose(sweep, job.train.seed)
    if sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UsageError("--search optuna needs Optuna: pip install -e '.[optuna]'")
    for size in sweep.batch_sizes:
        if size > len(images.train):
            raise UsageError(f"--batch-sizes: {size:,} is larger than the {len(images.train):,} images to train on")


def _print_header(
    console: SweepConsole,
    sweep: SweepConfig,
    job: JobConfig,
    run: RunFolder,
    images: Images,
    plan: WorkerPlan,
    concurrent: int,
) -> None:
    console.say("sweep", run.name)
    print_data(console, images)
    trials = f"{count(sweep.num_trials, 'trial')} of {count(job.train.num_epochs, 'epoch')}"
    sizes = f"batch size from {', '.join(map(str, sweep.batch_sizes))}"
    rates = f"learning rate {sweep.learning_rate_min:g} to {sweep.learning_rate_max:g}"
    console.say("search", f"{sweep.search}, {trials}: {sizes}; {rates}; scheduler {sweep.scheduler}")
    each = f"{count(plan.num_workers, 'worker')} with {count(plan.cpus_per_worker, 'CPU')}"
    console.say("trials", f"{concurrent} at a time, each {each}{' and 1 GPU' if plan.use_gpu else ''}")
    console.say("results", run.uri)


def _train_the_best(best: JobConfig, run: RunFolder, images: Images, cluster: Cluster, resume_with: str) -> None:
    """Train and evaluate the default configuration, where it is another one and fits the data, and the best."""
    default = Point(TrainConfig().batch_size, TrainConfig().learning_rate, best.train.seed)
    baseline = dataclasses.replace(best, train=default.applied_to(best.train))
    lines = []
    for title, job, folder in (("default", baseline, run.inside("default")), ("best", best, run)):
        if title == "default" and (job == best or job.train.batch_size > len(images.train)):
            continue
        chosen = f"batch size {job.train.batch_size}, learning rate {job.train.learning_rate:g}"
        accuracy = _known_accuracy(folder)
        with RunConsole(job.train.num_epochs, quiet=job.output.quiet) as console:
            console.say("", "")
            console.say(title, f"training with {chosen}")
            if accuracy is None:
                clock = Clock(time.perf_counter())
                accuracy = train_run(job, folder, images, cluster, console, clock, resume_with, is_last=title == "best")
        lines.append((title, f"{accuracy:.2%} on the test set with {chosen}"))
    with RunConsole(0, quiet=best.output.quiet) as console:
        console.say("", "")
        for title, line in lines:
            console.result(title, line)


def _known_accuracy(folder: RunFolder) -> float | None:
    """Return the test accuracy of a run that an interrupted sweep has finished already."""
    text = folder.read_text(RESULT_FILE)
    return None if text is None else float(json.loads(text)["test_accuracy"])
