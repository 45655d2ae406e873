"""What is settled before a job needs torch: its settings, its folder, its images, its Ray.

Nothing here imports torch, so that a mistake is answered at once; and torch is imported while Ray starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mnist_ray import config as settings
from mnist_ray.cluster.connection import connect
from mnist_ray.config import JobConfig, OutputConfig, WorkerConfig
from mnist_ray.display.console import RunConsole
from mnist_ray.errors import UsageError
from mnist_ray.storage import CONFIG_FILE, RESULT_FILE, RunFolder, locate
from mnist_ray.training.events import EpochFinished, Event, Started
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import Split


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
    with connect(job.workers, verbose=job.output.verbose, importing="torch") as cluster, console:
        from mnist_ray.runs.run import check_run, train_run

        if job.output.check:
            check_run(job, run, images, cluster, console)
        else:
            resume_with = run.resume_command("train", job.output.mlflow)
            train_run(job, run, images, cluster, console, clock, resume_with, is_last=True)


def open_run(
    flags: Mapping[str, Any], kind: str, config_file: str, config_classes: tuple[type, ...]
) -> tuple[dict[str, Any], RunFolder]:
    """Settle a job's settings and its folder, new or, with ``--resume``, an interrupted run's.

    ``config_file`` is where the run keeps the settings of ``config_classes``. Raises UsageError.
    """
    chosen = settings.chosen_values(flags)
    output = settings.build(OutputConfig, chosen)
    if output.resume and output.run_name is None:
        raise UsageError("--resume needs --run-name NAME")
    if output.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UsageError("--mlflow needs MLflow: pip install -e '.[mlflow]'")
    run = locate(output.storage_path, output.run_name or _new_name(kind))
    if output.resume:
        return _resumed(run, chosen, config_file, config_classes), run
    if run.exists():
        raise UsageError(f"run {run.uri} exists already; add --resume to go on with it, or give another --run-name")
    return chosen, run


def _new_name(kind: str) -> str:
    """Return a run's name when none is given: two jobs that begin in the same second have different ones."""
    return f"{kind}_{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}"


def _resumed(
    run: RunFolder, asked: Mapping[str, Any], config_file: str, config_classes: tuple[type, ...]
) -> dict[str, Any]:
    """Return an interrupted run's settings, with the workers and output of now. Raises UsageError."""
    text = run.read_text(config_file)
    if text is None:
        raise UsageError(f"--resume: there is no run to go on with in {run.uri}: no {config_file}")
    if run.exists(RESULT_FILE):
        raise UsageError(f"--resume: run {run.name} is finished; its result is in {run.inside(RESULT_FILE).uri}")
    saved = settings.parse_config(text, run.inside(config_file).uri, config_classes)
    values = {**saved, **asked}
    for config_class in config_classes:
        if config_class is WorkerConfig:  # free to change: the batches do not depend on them
            continue
        now: Any = settings.build(config_class, values)
        then: Any = settings.build(config_class, saved)
        for field in dataclasses.fields(config_class):
            if (new := getattr(now, field.name)) != (old := getattr(then, field.name)):
                raise UsageError(
                    f"--resume: run {run.name} was started with {settings.flag(field.name)} {old}, not {new}; "
                    "leave the flag out, or start another run"
                )
    return values


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


def print_data(console: RunConsole, images: Images) -> None:
    """Print the line of the header that tells of the data."""
    counts = f"{len(images.train):,} images to train on, {len(images.validation):,} for validation"
    console.say("data", f"{images.name}: {counts}, {len(images.test):,} to test")
