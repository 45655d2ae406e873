"""A job from its first line of output to its last. The first lines are printed before Ray and torch are imported."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from mnist_ray.cluster import environment
from mnist_ray.cluster.plan import Cluster, WorkerPlan, usable_cores
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import (
    JobError,
    TrainingStoppedError,
    UnreadableDataError,
    UsageError,
    count,
    format_settings,
    with_place,
)
from mnist_ray.run.console import RunConsole
from mnist_ray.run.job import Job, check_free
from mnist_ray.run.lease import owned
from mnist_ray.settings import flag
from mnist_ray.signals import if_ended
from mnist_ray.storage import RESULT_FILE, STORAGE_ERRORS
from mnist_ray.training.events import EpochFinished, Event, Started
from mnist_ray.workload.data import Blocks, Split, Splits
from mnist_ray.workload.loading import digests_of
from mnist_ray.workload.loading import load_data as load_data_of
from mnist_ray.workload.splits import splits_of, subset
from ray_fork.starting import prepared_forking

_SMALL_ON_GPU = 64  # examples of a step: so few leave most of a GPU idle

Self = TypeVar("Self", bound="Session")


class Session(contextlib.ExitStack):
    """The state that every step of a job needs; a context manager, which says how to resume if the job fails."""

    data: Splits
    console: RunConsole
    cluster: Cluster
    plan: WorkerPlan
    _unused: set[str] | None = None  # settings, by the workload's own optimizer and schedule, if it has any

    def __init__(self, job: Job, modules: str, workers: WorkerConfig | None = None) -> None:
        super().__init__()
        self.job = job
        self.workers = workers or job.workers
        self.clock = Clock()
        self._modules = modules

    @property
    def is_here(self) -> bool:
        """Whether this process trains, without Ray."""
        return self.workers.num_workers == 0

    def __enter__(self: Self) -> Self:
        environment.prepare(verbose=self.job.output.verbose)
        self.enter_context(ending_explained(self.job))
        if not self.is_here:
            is_wanted = self.workers.fork_workers == "auto"
            self._forking = self.enter_context(prepared_forking(self._modules, is_wanted=is_wanted))
        self.clock.mark("start")
        return self

    def begin(self, job: Job, data: Splits, console: RunConsole, say_header: Callable[[Session], None]) -> None:
        """Print the header of a job whose data are loaded, and own its run until the end.

        Raises JobError if the storage is not writable; UsageError if another job owns the run.
        """
        self.job, self.data = job, data
        job.run.check_writable()
        self.clock.mark("data")
        self.console = self.enter_context(console)
        say_header(self)
        self.enter_context(owned(job.run, self.console.waiting))
        check_free(job.run, resume=job.output.resume)  # again: another job may have created the run meanwhile
        if job.output.resume:
            if_ended(f"; to resume: {job.resume_with}")

    @property
    def unused(self) -> set[str]:
        """The settings that the optimizer and the schedule do not use."""
        return self.job.train.unused if self._unused is None else self._unused

    @contextlib.contextmanager
    def ray(self, batch_sizes: Sequence[int] = ()) -> Iterator[None]:
        """Send a batch through the workload, and join a cluster or start a local Ray.

        The batch comes first, so that an error in the user's code is reported before anything starts. This package's
        workloads are tested, so their batch and the imports wait until Ray is starting. ``batch_sizes``: the batch
        sizes of a sweep. With ``--num-workers 0``, there is no Ray. Raises UsageError and JobError.
        """
        is_own = type(self.job.workload).__module__.startswith("mnist_ray.")
        if not is_own:
            self._unused = _try_batch(self.job, self.data.train, batch_sizes)

        def meanwhile() -> None:
            importlib.import_module(self._modules)  # with Ray Train, which ray.init does not import
            if is_own:
                self._unused = _try_batch(self.job, self.data.train, batch_sizes)

        if self.is_here:
            meanwhile()
            self.cluster = Cluster(is_local=True, nodes=(), log_folder="")
            yield
            return
        from mnist_ray.cluster.connect import connect  # imports Ray, after the header is printed

        verbose = self.job.output.verbose
        with connect(self.workers, self._forking, verbose=verbose, meanwhile=meanwhile) as self.cluster:
            if self.cluster.note:
                self.console.say("note", self.cluster.note)
            yield


@contextlib.contextmanager
def ending_explained(job: Job) -> Iterator[None]:
    """Add how to resume to an interrupt, and to an error if that may help; raise ``sys.exit()`` as a JobError."""
    try:
        yield
    except SystemExit as error:
        raise JobError(with_place(error, *job.code_folders)) from error
    except JobError as error:
        is_final = isinstance(error, TrainingStoppedError) and not isinstance(error, UnreadableDataError)
        if is_final or not (advice := _advice(job)):
            raise
        raise type(error)(f"{error}; {advice}") from error
    except KeyboardInterrupt as interrupt:
        advice = _advice(job) or "nothing is saved yet: start again"
        raise KeyboardInterrupt(f"interrupted; {advice}") from interrupt


def _advice(job: Job) -> str:
    """Return how to resume a run, or where its result is; empty if nothing is saved yet."""
    with contextlib.suppress(JobError, *STORAGE_ERRORS):  # if the storage does not answer, the run may have begun
        if job.run.read_json(RESULT_FILE) is not None:
            return f"the run is finished: {job.run.inside(RESULT_FILE).uri}"
        if not job.run.exists():
            return ""
    return f"to resume: {job.resume_with}"


def _try_batch(job: Job, train: Split, batch_sizes: Sequence[int]) -> set[str] | None:
    """Send a batch through the job's workload; return like ``try_batch``. Raises UsageError."""
    from mnist_ray.training.check import try_batch  # imports torch

    num_workers, num_chunks = job.workers.num_workers or 1, job.train.num_chunks
    smallest = Fraction(1, job.train.chunks or num_workers)
    if isinstance(train.examples, Blocks) and not job.train.reproducible:  # each worker has some of the streams
        smallest = Fraction(num_chunks // num_workers, num_chunks)
    unused = try_batch(job.workload, train, job.train, batch_sizes or [job.train.batch_size], smallest)
    if given := sorted(job.given & (unused or set())):
        own = f"{type(job.workload).__name__}'s optimizer and schedule"
        raise UsageError(f"{flag(given[0])} has no effect: {own} do not use it; leave it out")
    return unused


def console_of(job: Job) -> RunConsole:
    """Return a run's console."""
    return RunConsole(job.workload, job.train.num_epochs, quiet=job.output.quiet)


def say_run(session: Session) -> None:
    """Print the header of a run: data, training, settings."""
    job, console, config = session.job, session.console, session.job.train
    console.say("run", job.run.name)
    say_data(console, job, session.data)
    steps = count(config.num_steps(len(session.data.train)), "step")
    console.say(
        "training",
        f"{count(config.num_epochs, 'epoch')} of {steps}, batch size {config.batch_size}, "
        f"{config.schedule} learning rate {config.learning_rate:g}, precision {config.precision}",
    )
    printed = {"num_epochs", "batch_size", "schedule", "learning_rate", "precision"}
    defaults = {name: value for name, value in job.workload.defaults.items() if name not in printed}
    changed = {name: job.values[name] for name, default in defaults.items() if job.values[name] != default}
    if changed:
        console.say("settings", format_settings(changed))
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")


def say_data(console: RunConsole, job: Job, data: Splits) -> None:
    """Print a job's notes, and the sizes of its data."""
    for note in job.notes:
        console.say("note", note)
    counts = f"{len(data.train):,} {job.workload.nouns} to train on, {len(data.validation):,} for validation"
    console.say("data", f"{data.name}: {counts}, {len(data.test):,} to test")


def say_plan(session: Session) -> int:
    """Print the model and the workers that train it; return the number of parameters."""
    job, console, cluster, plan = session.job, session.console, session.cluster, session.plan
    model = job.workload.create_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained = "" if num_trained == num_parameters else f", {num_trained:,} of them trained"
    console.say("model", f"{type(model).__name__}, {num_parameters:,} parameters{trained}")
    if session.is_here:
        console.say("workers", "none: this process trains, without Ray")
        return num_parameters
    resources = count(plan.cpus_per_worker, "CPU") + (" and 1 GPU" if plan.use_gpu else "")
    place = "a local Ray" if cluster.is_local else f"a Ray cluster of {count(len(cluster.nodes), 'node')}"
    console.say("workers", f"{plan.num_workers}, each with {resources}, on {place}")
    cores = usable_cores()
    if cluster.is_local and not plan.use_gpu and plan.num_workers > cores:
        shared = f"{plan.num_workers} workers share {cores} cores"
        console.say("note", f"{shared}: --num-workers {cores} would be at least as fast")
    each = job.train.batch_size // plan.num_workers
    if plan.use_gpu and each < _SMALL_ON_GPU:
        console.say("note", f"{each} {job.workload.nouns} a step leave a GPU idle: a larger --batch-size is faster")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    console.waiting("starting workers …")
    return num_parameters


class Clock:
    """Measures the seconds of each part of a job, from the creation of the clock on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._has_trained = False

    def mark(self, name: str) -> None:
        """Add the time since the last mark to the part ``name``."""
        now = time.perf_counter()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, event: Event) -> None:
        """Mark the end of the start, and the end of the training."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.mark("start")
        if isinstance(event, EpochFinished):
            self.mark("training")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and the total."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}


def load_data(job: Job, batch_sizes: Sequence[int] = ()) -> tuple[Job, Splits]:
    """Return the job, with notes about its data, and the data. The job's workload gets the data's metadata.

    If nobody has chosen the batch size and there are fewer examples, all of them make a batch. ``batch_sizes``: the
    batch sizes of a sweep. Raises JobError; UsageError, for example if a resumed run was started with different data.
    """
    splits = subset(splits_of(load_data_of(job.workload), job.train.validation_size), job.train)
    notes = [*job.notes, *_check_same_data(job, splits)]
    most, largest = len(splits.train), max(batch_sizes or [job.train.batch_size])
    if largest > most:
        there, name = f"{most:,} {job.workload.nouns} to train on", "sweep" if batch_sizes else "batch_size"
        if name in job.given:
            asked = "--sweep: batch size" if batch_sizes else "--batch-size"
            raise UsageError(f"{asked} {largest:,} is larger than the {there}")
        notes.append(f"batch size {most:,}, not {largest:,}: there are only {there}")
        if job.train.batch_size > most:
            job = job.with_values({"batch_size": most})
    fewest = dataclasses.replace(job.train, batch_size=min(largest, most)).num_steps(most) * job.train.num_epochs
    if job.train.warmup_steps >= fewest:
        raise UsageError(f"--warmup-steps {job.train.warmup_steps:,} must be below the {fewest:,} steps of the run")
    if isinstance(blocks := splits.train.examples, Blocks):
        streams = f"{count(job.train.num_chunks, 'stream')} of blocks (--num-chunks)"
        if (job.workers.num_workers or 1) > job.train.num_chunks:
            raise UsageError(f"--num-workers {job.workers.num_workers} is more than the {streams}")
        if len(blocks.sizes) < job.train.num_chunks:
            notes.append(f"{count(len(blocks.sizes), 'block')} for {streams}: some are read twice; write smaller ones")
    if job.train.early_stop is not None:
        if len(splits.validation) == 0:
            raise UsageError("--early-stop needs validation; leave --validation-size 0 and --overfit-batches out")
        if job.train.schedule != "constant":
            said = f"the {job.train.schedule} schedule spans all epochs: if training stops early, the learning rate has"
            notes.append(f"{said} not come down; --schedule constant avoids that")
    return dataclasses.replace(job, notes=tuple(notes)), splits


def _check_same_data(job: Job, splits: Splits) -> list[str]:
    """Raise UsageError if a resumed run was started with different data; return a note if that cannot be checked."""
    then, now = job.origin.get("data") or {}, digests_of(splits) if job.origin else {}
    differing = [split for split in then if None not in (then[split], now.get(split)) and then[split] != now[split]]
    if differing:
        raise UsageError(
            f"--resume: the data differ from those that run {job.run.name} was started with "
            f"({', '.join(differing)} of {splits.name}); restore them, or start another run"
        )
    if then and None in now.values():
        return ["cannot check that the data are unchanged: the workload does not list their files (Data.files)"]
    return []
