"""One training job from settings to result: what ``jobs/train.py`` does once its flags are read."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from ray.util.queue import Queue

from mnist_ray import config as settings
from mnist_ray import data, evaluation, preflight, tracking, trainer
from mnist_ray.checkpoint import read_state
from mnist_ray.cluster import Cluster, WorkerPlan, connect, plan_workers, quiet_ray, this_node, usable_cores
from mnist_ray.config import DataConfig, EvaluationConfig, JobConfig, LookupConfig, OutputConfig, WorkerConfig
from mnist_ray.console import RunConsole, confusion_table, count
from mnist_ray.data import Split
from mnist_ray.errors import JobError, UsageError
from mnist_ray.events import EpochFinished, Event, Started
from mnist_ray.history import History, write_predictions
from mnist_ray.metrics import Evaluation
from mnist_ray.model import create_model, num_parameters
from mnist_ray.provenance import origin
from mnist_ray.storage import CONFIG_FILE, ORIGIN_FILE, REPORT_FILE, RESULT_FILE, RunFolder, locate
from mnist_ray.tracking import Ending


@dataclass(frozen=True)
class Images:
    """A job's images, checked against its settings."""

    name: str
    train: Split
    validation: Split
    test: Split


def load_images(job: JobConfig) -> Images:
    """Read the data set and hold out the validation images. Raises UsageError and JobError."""
    source = data.find(job.data)
    full, test = source.load("train"), source.load("test")
    settings.check_fits(job.train, len(full))
    train, validation = data.hold_out(full, job.train.validation_size)
    return Images(source.name, train, validation, test)


def train_and_evaluate(flags: Mapping[str, Any], started_at: float) -> None:
    """Run a whole job: train, evaluate once on the test set, write the run's files, print what came out.

    ``started_at`` is when the process began, by ``time.perf_counter``. Raises UsageError and JobError.
    """
    clock = Clock(started_at)
    values, run = open_run(flags, "train", CONFIG_FILE, settings.RUN_SETTINGS)
    job = settings.build_job(values)
    clock.lap("start")
    images = load_images(job)
    clock.lap("data")
    run.check_writable()
    console = RunConsole(job.train.num_epochs, quiet=job.output.quiet)
    with connect(job.workers, verbose=job.output.verbose) as cluster, console:
        if job.output.check:
            plan = plan_workers(job.workers, cluster)
            _print_header(console, job, run, images, cluster, plan)
            preflight.check_job(run, images.train, job.train.batch_size, cluster, plan, console.say)
            return
        train_run(job, run, images, cluster, console, clock, resume_command("train", run))


def train_run(
    job: JobConfig,
    run: RunFolder,
    images: Images,
    cluster: Cluster,
    console: RunConsole,
    clock: Clock,
    resume_with: str,
) -> float:
    """Train into ``run`` on a connected cluster, evaluate, write the files; return the test accuracy.

    However it ends, the run's report is written and its trackers are told.
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
        tested = evaluation.evaluate(fitted.checkpoint, images.test, len(images.test))
        clock.lap("evaluation")
        result = _result(fitted, tested, history, clock, plan)
        write_predictions(run, images.test.labels, tested)
        run.write_text(RESULT_FILE, settings.json_lines(result))
        _print_evaluation(console, tested)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted; to go on: {resume_with}") from interrupt
    except trainer.TrainingStoppedError:
        raise
    except JobError as error:
        raise JobError(f"{error} (logs: {cluster.log_folder}; to go on: {resume_with})") from error
    finally:
        pictures = _write_report(run, history, images, console)
        trackers.close(Ending(result, pictures, fitted.checkpoint if fitted else None))
    clock.lap("report")
    _print_files(console, run, result, clock)
    return tested.accuracy


def _result(
    fitted: trainer.FitResult, tested: Evaluation, history: History, clock: Clock, plan: WorkerPlan
) -> dict[str, Any]:
    """Return what result.json holds."""
    return tested.to_dict("test") | {
        "checkpoint": fitted.checkpoint.path.rstrip("/").rsplit("/", 1)[-1],
        "checkpoint_metrics": fitted.metrics,
        "images_per_s": _mean_images_per_s(history),
        "seconds": clock.seconds(),
        "num_workers": plan.num_workers,
        **origin(),
    }


def _write_report(run: RunFolder, history: History, images: Images, console: RunConsole) -> dict[str, bytes]:
    """Write the run's report and return its pictures; where that fails, say so: the run is not lost for it."""
    from mnist_ray import report  # imports matplotlib, which nothing needs to wait for before

    try:
        history.flush()
        return {picture.name: picture.png for picture in report.write(run, images.test)}
    except (UsageError, JobError) as error:
        console.say("note", f"no report: {error}")
        return {}


def open_run(
    flags: Mapping[str, Any], kind: str, config_file: str, config_classes: tuple[type, ...]
) -> tuple[dict[str, Any], RunFolder]:
    """Settle a job's settings and its folder, new or, with ``--resume``, an interrupted run's.

    ``config_file`` is where the run keeps the settings of ``config_classes``. Raises UsageError.
    """
    chosen = settings.chosen_values(flags)
    output = settings.build(OutputConfig, chosen, settings.flag)
    if output.resume and output.run_name is None:
        raise UsageError("--resume needs --run-name NAME")
    if output.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UsageError("--mlflow needs MLflow: pip install -e '.[mlflow]'")
    run = locate(output.storage_path, output.run_name or datetime.now().strftime(f"{kind}_%Y-%m-%d_%H-%M-%S"))
    if output.resume:
        return _resumed(run, chosen, config_file, config_classes), run
    if run.exists():
        raise UsageError(f"run {run.uri} exists already; add --resume to go on with it, or give another --run-name")
    return chosen, run


def _resumed(
    run: RunFolder, asked: Mapping[str, Any], config_file: str, config_classes: tuple[type, ...]
) -> dict[str, Any]:
    """Return an interrupted run's settings, with the workers and output of now. Raises UsageError."""
    text = run.read_text(config_file)
    if text is None:
        raise UsageError(f"--resume: there is no run to go on with in {run.uri}: no {config_file}")
    if run.exists(RESULT_FILE):
        raise UsageError(f"--resume: run {run.name} is finished; its result is in {run.uri}/{RESULT_FILE}")
    saved = settings.parse_config(text, f"{run.uri}/{config_file}", config_classes)
    values = {**saved, **asked}
    for config_class in config_classes:
        if config_class is WorkerConfig:  # free to change: the batches do not depend on them
            continue
        now: Any = settings.build(config_class, values, settings.flag)
        then: Any = settings.build(config_class, saved, settings.flag)
        for field in dataclasses.fields(config_class):
            if (new := getattr(now, field.name)) != (old := getattr(then, field.name)):
                raise UsageError(
                    f"--resume: run {run.name} was started with {settings.flag(field.name)} {old}, not {new}; "
                    "leave the flag out, or start another run"
                )
    return values


def resume_command(kind: str, run: RunFolder) -> str:
    """Return the command that goes on with an interrupted run of ``jobs/KIND.py``."""
    return f"python jobs/{kind}.py --resume --run-name {run.name} --storage-path {run.storage_path}"


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


def about(job: JobConfig) -> dict[str, Any]:
    """Return what a job's checkpoints say of where they come from."""
    return {"config": dataclasses.asdict(job.train), "data": dataclasses.asdict(job.data)}


class Clock:
    """Where a job's seconds went."""

    def __init__(self, started_at: float) -> None:
        """Start at a time that ``time.perf_counter`` has given."""
        self._start = self._last = started_at
        self._laps: dict[str, float] = {}
        self._has_trained = False

    def lap(self, name: str) -> None:
        """Count the time since the last lap as that of ``name``."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, event: Event) -> None:
        """Tell the start from the training, and that from the wait for the last validation."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.lap("start")
        if isinstance(event, EpochFinished):
            self.lap("training")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and in all."""
        laps = {name: round(seconds, 3) for name, seconds in self._laps.items()}
        return {**laps, "total": round(self._last - self._start, 3)}


def _mean_images_per_s(history: History) -> float:
    rates = [(float(row["images_per_s"]), float(row["epoch_s"])) for row in history.rows.values()]
    return round(sum(rate * seconds for rate, seconds in rates) / sum(seconds for _, seconds in rates), 1)


def _print_header(
    console: RunConsole,
    job: JobConfig,
    run: RunFolder,
    images: Images,
    cluster: Cluster,
    plan: WorkerPlan,
) -> None:
    steps = data.num_steps(len(images.train), job.train.batch_size)
    console.say("run", run.name)
    print_data(console, images)
    console.say("model", f"{type(create_model()).__name__}, {num_parameters(create_model()):,} parameters")
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
        console.say("note", f"{plan.num_workers} workers share {cores} cores: --num-workers {cores} would be as fast")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    if not job.output.check:
        console.waiting("starting workers …")


def print_data(console: RunConsole, images: Images) -> None:
    """Print the line of the header that tells of the data."""
    counts = f"{len(images.train):,} images to train on, {len(images.validation):,} for validation"
    console.say("data", f"{images.name}: {counts}, {len(images.test):,} to test")


def _print_files(console: RunConsole, run: RunFolder, result: dict[str, Any], clock: Clock) -> None:
    parts = clock.seconds()
    total = parts.pop("total")
    each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    console.say("seconds", f"{total:.1f} in all: {each}")
    console.result("checkpoint", f"{run.uri}/{result['checkpoint']}")
    console.result("result", f"{run.uri}/{RESULT_FILE}")
    console.result("report", f"{run.uri}/{REPORT_FILE}")


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
    evaluation_config = settings.build(EvaluationConfig, flags, settings.flag)
    lookup = settings.build(LookupConfig, flags, settings.flag)
    checkpoint = evaluation.find_checkpoint(flags["checkpoint"], lookup.storage_path)
    with checkpoint.as_directory() as folder:
        own_data = read_state(Path(folder)).get("data", {})
    data_flags = {name: flags[name] for name in ("dataset", "data_dir") if name in flags}
    source = data.find(settings.build(DataConfig, data_flags or own_data, settings.flag))
    test = source.load("test")
    with connect(WorkerConfig(), verbose=False), RunConsole(num_epochs=0, quiet=False) as console:
        console.say("checkpoint", checkpoint.path)
        console.say("data", f"{source.name}: {len(test):,} test images")
        tested = evaluation.evaluate(checkpoint, test, len(test), evaluation_config.num_tasks)
        _print_evaluation(console, tested)
