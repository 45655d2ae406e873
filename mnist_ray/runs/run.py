"""One training run on a connected Ray, from its header to its report; and the evaluation of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.queue import Queue

from mnist_ray import config as settings
from mnist_ray.cluster import preflight
from mnist_ray.cluster.connection import Cluster, WorkerPlan, connect, plan_workers, quiet_ray, this_node, usable_cores
from mnist_ray.config import DataConfig, EvaluationConfig, JobConfig, WorkerConfig
from mnist_ray.display import tracking
from mnist_ray.display.console import RunConsole, confusion_table, count
from mnist_ray.display.history import History, write_predictions
from mnist_ray.display.tracking import Ending
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.provenance import origin
from mnist_ray.runs import evaluation, trainer
from mnist_ray.runs.launch import Clock, Images, about, print_data
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    STORAGE_ERRORS,
    RunFolder,
)
from mnist_ray.training.checkpoint import fetch
from mnist_ray.training.events import Event
from mnist_ray.training.metrics import Evaluation
from mnist_ray.training.sharding import num_steps
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.network import create_model, num_parameters


def check_run(job: JobConfig, run: RunFolder, images: Images, cluster: Cluster, console: RunConsole) -> None:
    """Say how a job would run, and whether it would. Raises UsageError and JobError where it would not."""
    plan = plan_workers(job.workers, cluster)
    _print_header(console, job, run, images, cluster, plan)
    preflight.check_job(run, images.train, job.train.batch_size, plan, console.say)


def train_run(
    job: JobConfig,
    run: RunFolder,
    images: Images,
    cluster: Cluster,
    console: RunConsole,
    clock: Clock,
    resume_with: str,
    *,
    is_last: bool,
) -> float:
    """Train into ``run`` on a connected cluster, evaluate, write the files; return the test accuracy.

    After the last run of a job the cluster is left while the report is written. However it ends, the run's report is
    written and its trackers are told.
    """
    plan = plan_workers(job.workers, cluster)
    _print_header(console, job, run, images, cluster, plan)
    preflight.check_storage(run)
    run.write_text(CONFIG_FILE, settings.to_json(job))
    run.write_text(ORIGIN_FILE, settings.json_lines(origin()))
    history = History(run)
    trackers = tracking.start(run, job.train, job.output.mlflow, functools.partial(console.say, "note"))

    def on_event(event: Event) -> None:
        clock.note(event)
        history.add(event)
        console.show(event)
        trackers.log(event)

    result = fitted = None
    try:
        fitted = _fit(job, run, images, plan, on_event)
        clock.lap("validation")
        if job.train.validation_size > 0 and (epochs := history.unvalidated):
            shown = ", ".join(map(str, epochs))
            console.say("note", f"not validated, since the task or the run was interrupted: epoch {shown}")
        tested = evaluation.evaluate(fitted.checkpoint, images.test, len(images.test))
        clock.lap("evaluation")
        if is_last:
            cluster.leave()
        result = _result(fitted, tested, history, clock)
        write_predictions(run, images.test.labels, tested)
        run.write_text(RESULT_FILE, settings.json_lines(result))
        _print_evaluation(console, tested)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted; to go on: {resume_with}") from interrupt
    except trainer.TrainingStoppedError as error:
        raise JobError(f"{error} (logs: {cluster.log_folder})") from error
    except JobError as error:
        raise JobError(f"{error} (logs: {cluster.log_folder}; to go on: {resume_with})") from error
    finally:
        pictures = _write_report(run, history, images, console)
        trackers.close(Ending(result, pictures, fitted.checkpoint if fitted else None))
    clock.lap("report")
    _print_files(console, run, result, clock)
    return tested.accuracy


def _result(fitted: trainer.FitResult, tested: Evaluation, history: History, clock: Clock) -> dict[str, Any]:
    """Return what result.json holds."""
    return tested.to_dict("test") | {
        "checkpoint": fitted.checkpoint.path.rstrip("/").rsplit("/", 1)[-1],
        "checkpoint_metrics": fitted.metrics,
        "images_per_s": _mean_images_per_s(history) or fitted.metrics["images_per_s"],
        "seconds": clock.seconds(),
        "num_workers": history.num_workers,
        **origin(),
    }


def _write_report(run: RunFolder, history: History, images: Images, console: RunConsole) -> dict[str, bytes]:
    """Write the run's report and return its pictures; where that fails, say so: the run is not lost for it."""
    from mnist_ray.display import report  # imports matplotlib, which nothing needs to wait for before

    try:
        history.flush()
        return {picture.name: picture.png for picture in report.write(run, images.test)}
    except (UsageError, JobError, *STORAGE_ERRORS) as error:
        console.say("note", f"no report: {first_line(error)}")
        return {}


def _fit(
    job: JobConfig, run: RunFolder, images: Images, plan: WorkerPlan, on_event: Callable[[Event], None]
) -> trainer.FitResult:
    spec = trainer.LoopSpec(
        config=job.train,
        split=ray.put(images.train),
        run=run,
        events=Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()}),
        about=about(job),
        hang_timeout_s=job.workers.hang_timeout_s,
    )
    held_out = ray.put(images.validation) if len(images.validation) else None
    return trainer.fit(spec, plan, held_out, job.workers.max_failures, on_event)


def _mean_images_per_s(history: History) -> float | None:
    """Return the rate over all epochs that were told of: of those before a kill, the last may not have been."""
    told = [row for row in history.rows.values() if row.get("epoch_s")]
    rates = [(float(row["images_per_s"]), float(row["epoch_s"])) for row in told]
    if not rates:
        return None
    return round(sum(rate * seconds for rate, seconds in rates) / sum(seconds for _, seconds in rates), 1)


def _print_header(
    console: RunConsole,
    job: JobConfig,
    run: RunFolder,
    images: Images,
    cluster: Cluster,
    plan: WorkerPlan,
) -> None:
    steps = num_steps(len(images.train), job.train.batch_size)
    console.say("run", run.name)
    print_data(console, images)
    model = create_model()
    console.say("model", f"{type(model).__name__}, {num_parameters(model):,} parameters")
    console.say(
        "training",
        f"{count(job.train.num_epochs, 'epoch')} of {count(steps, 'step')}, batch size {job.train.batch_size}, "
        f"{job.train.schedule} learning rate {job.train.learning_rate:g}, precision {job.train.precision}",
    )
    gpu = " and 1 GPU" if plan.use_gpu else ""
    where = "a local Ray" if cluster.is_local else f"a Ray cluster of {count(len(cluster.nodes), 'node')}"
    cpus = count(plan.cpus_per_worker, "CPU")
    console.say("workers", f"{plan.num_workers}, each with {cpus}{gpu}, on {where}")
    console.say("results", run.uri)
    cores = usable_cores()
    if cluster.is_local and not plan.use_gpu and plan.num_workers > cores:
        shared = f"{plan.num_workers} workers share {cores} cores"
        console.say("note", f"{shared}: --num-workers {cores} would be at least as fast")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    if not job.output.check:
        console.waiting("starting workers …")


def _print_files(console: RunConsole, run: RunFolder, result: dict[str, Any], clock: Clock) -> None:
    parts = clock.seconds()
    total = parts.pop("total")
    each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    console.say("seconds", f"{total:.1f} in all: {each}")
    console.result("checkpoint", run.inside(result["checkpoint"]).uri)
    console.result("result", run.inside(RESULT_FILE).uri)
    console.result("report", run.inside(REPORT_FILE).uri)


def _print_evaluation(console: RunConsole, tested: Evaluation) -> None:
    """Print the confusion matrix with each class's accuracy, then accuracy and loss over all."""
    label = "confusion"
    for line in confusion_table(tested):
        console.say(label, line)
        label = ""
    console.result("test", f"accuracy {tested.accuracy:.2%}, loss {tested.loss:.4f} on {tested.num_images:,} images")


def evaluate_checkpoint(flags: Mapping[str, Any]) -> None:
    """Evaluate a checkpoint or a run's choice on the test set that flags name, else on that of its own data.

    Raises UsageError and JobError.
    """
    quiet_ray()
    evaluation_config = settings.build(EvaluationConfig, flags)
    checkpoint = evaluation.find_checkpoint(flags["checkpoint"], flags)
    _, saved = fetch(checkpoint.filesystem, checkpoint.path)
    data_flags = {name: flags[name] for name in ("dataset", "data_dir") if name in flags}
    source = data.find(settings.build(DataConfig, data_flags or saved.get("data", {})))
    test = source.load("test")
    with connect(WorkerConfig(), verbose=False), RunConsole(num_epochs=0, quiet=False) as console:
        console.say("checkpoint", checkpoint.path)
        console.say("data", f"{source.name}: {len(test):,} test images")
        tested = evaluation.evaluate(checkpoint, test, len(test), evaluation_config.num_tasks)
        _print_evaluation(console, tested)
