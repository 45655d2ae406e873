"""A job from its first line of output to its last. The first lines are printed before Ray and torch are imported."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from mnist_ray import extras
from mnist_ray.cluster import environment, kept
from mnist_ray.cluster.plan import Cluster, WorkerPlan, check_memory, suitable, threads_per_worker, usable_cores
from mnist_ray.config import WorkerConfig
from mnist_ray.data.data import Blocks, Split, Splits
from mnist_ray.errors import JobError, TrainingStoppedError, UnreadableDataError, UsageError, with_place
from mnist_ray.job.job import Job, check_free
from mnist_ray.job.lease import owned
from mnist_ray.report.console import RunConsole
from mnist_ray.settings import flag
from mnist_ray.signals import if_ended, take_signals
from mnist_ray.storage import RESULT_FILE, STORAGE_ERRORS
from mnist_ray.text import count, format_settings, size_of
from mnist_ray.training.events import EpochFinished, Event, Started, Validated
from ray_fork.starting import Forking, prepared_forking

if TYPE_CHECKING:
    from torch import nn

_SMALL_ON_GPU = 64  # examples of a step: so few leave most of a GPU idle


@dataclass(frozen=True)
class Start:
    """What a job has before its data are loaded."""

    clock: Clock
    workers: WorkerConfig
    preload: str  # the module that workers need; it is imported while Ray starts
    forking: Forking | None  # None if this process trains, without Ray


@dataclass(frozen=True)
class Session:
    """What every step of a job needs, from the connection to Ray on."""

    job: Job
    workers: WorkerConfig
    data: Splits
    console: RunConsole
    clock: Clock
    cluster: Cluster
    own_unused: set[str] | None  # settings that the workload's own optimizer and schedule do not use, if it has any

    @property
    def is_here(self) -> bool:
        """Whether this process trains, without Ray."""
        return self.workers.num_workers == 0

    @property
    def unused(self) -> set[str]:
        """The settings that the optimizer and the schedule do not use."""
        return self.job.train.unused if self.own_unused is None else self.own_unused


@contextlib.contextmanager
def started(job: Job, preload: str, workers: WorkerConfig | None = None) -> Iterator[Start]:
    """Set this process up, and start a fork server. However the job ends, say how to resume if that may help."""
    clock, workers = Clock(), workers or job.workers
    cores = usable_cores()
    num_threads = threads_per_worker(cores, cores, 1, job.train.batch_size)
    environment.prepare(verbose=job.output.verbose, plain=workers.plain_ray, num_threads=num_threads)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(ending_explained(job))
        forking = None
        if workers.num_workers != 0:
            kept.end_unless_fit(workers, verbose=job.output.verbose)
            is_wanted = workers.fork_workers == "auto" and not workers.plain_ray
            prepared = prepared_forking(preload, *environment.IMPORTED_LATE, is_wanted=is_wanted)
            forking = at_the_end.enter_context(prepared)
        clock.mark("start")
        yield Start(clock, workers, preload, forking)


@contextlib.contextmanager
def opened(
    start: Start,
    job: Job,
    data: Splits,
    console: RunConsole,
    say_header: Callable[[], None],
    batch_sizes: Sequence[int] = (),
) -> Iterator[Session]:
    """Print a job's header, own its run until the end, and connect to Ray. ``batch_sizes``: those of a sweep.

    Raises JobError if the storage is not writable; UsageError if another job owns the run; and like ``connected``.
    """
    take_signals()  # again: the user's code may have handlers of its own
    job.run.check_writable()
    start.clock.mark("data")
    with console:
        say_header()
        with owned(job.run, console.waiting):
            check_free(job.run, resume=job.is_resumed)  # again: another job may have created the run meanwhile
            if job.is_resumed:
                if_ended(f"; to resume: {job.resume_with}")
            with connected(start, job, data, console, batch_sizes) as session:
                yield session


@contextlib.contextmanager
def connected(
    start: Start, job: Job, data: Splits, console: RunConsole, batch_sizes: Sequence[int] = ()
) -> Iterator[Session]:
    """Send a batch through the workload, and join a cluster or start a local Ray; with ``--num-workers 0``, do not.

    The batch comes first, so that an error in the user's code is reported before anything starts. This package's
    workloads are tested, so their batch and the imports wait until Ray is starting. Raises UsageError and JobError.
    """
    is_own, unused = type(job.workload).__module__.startswith("mnist_ray."), None
    if job.train.strategy == "fsdp" and (reason := _too_large(job)):
        console.say("note", f"no batch is tried before the start: {reason}")
    elif not is_own:
        unused = _try_batch(job, data.train, batch_sizes)

    def meanwhile() -> None:
        nonlocal unused
        with environment.without_collector():
            importlib.import_module(start.preload)  # with Ray Train, which ray.init does not import
        if is_own:
            unused = _try_batch(job, data.train, batch_sizes)

    if start.workers.num_workers == 0:
        meanwhile()
        cluster = Cluster(is_local=True, nodes=(), log_folder="")
        yield Session(job, start.workers, data, console, start.clock, cluster, unused)
        return
    with environment.without_collector():
        from mnist_ray.cluster.connect import connect  # imports Ray, after the header is printed

    with connect(start.workers, start.forking, verbose=job.output.verbose, meanwhile=meanwhile) as cluster:
        for note in filter(None, (*cluster.notes, extras.note(plain=start.workers.plain_ray))):
            console.say("note", note)
        if start.workers.use_gpu == "auto":
            from mnist_ray.cluster.devices import without_unusable_gpus  # imports torch

            cluster = without_unusable_gpus(cluster, functools.partial(console.say, "note"))
        yield Session(job, start.workers, data, console, start.clock, cluster, unused)


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
        error.hints += f"; {advice}"
        raise
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


def _too_large(job: Job) -> str:
    """Return why a model cannot be tried in this process, which may have less memory than the workers together."""
    import psutil

    from mnist_ray.parallel.sharding import on_meta

    model, free = on_meta(job.workload)[0], psutil.virtual_memory().available
    needed = 2 * sum(parameter.nbytes for parameter in model.parameters()) if model else 0  # weights and gradients
    return f"the model needs {size_of(needed)}, and {size_of(free)} are free here" if needed > free else ""


def _try_batch(job: Job, train: Split, batch_sizes: Sequence[int]) -> set[str] | None:
    """Send a batch through the job's workload; return like ``try_batch``. Raises UsageError."""
    from mnist_ray.job.dry_run import try_batch  # imports torch

    num_workers, num_chunks = job.workers.num_workers or 1, job.train.num_chunks
    smallest = Fraction(1, job.train.reproducible_chunks or num_workers)
    if isinstance(train.examples, Blocks) and not job.train.reproducible:  # each worker has some of the streams
        smallest = Fraction(num_chunks // num_workers, num_chunks)
    sizes = batch_sizes or [job.train.batch_size]
    unused = try_batch(job.workload, train, job.train, sizes, smallest, num_workers)
    if given := sorted(job.given & (unused or set())):
        own = f"{type(job.workload).__name__}'s loss, optimizer and schedule"
        raise UsageError(f"{flag(given[0])} has no effect: {own} do not use it; leave it out")
    return unused


def console_of(job: Job) -> RunConsole:
    """Return a run's console."""
    return RunConsole(job.workload, job.train.num_epochs, quiet=job.output.quiet)


def say_run(console: RunConsole, job: Job, data: Splits) -> None:
    """Print the header of a run: data, training, settings."""
    config = job.train
    console.say("run", job.run.name)
    say_data(console, job, data)
    steps = f"{count(config.num_epochs, 'epoch')} of {count(config.steps_per_epoch(len(data.train)), 'step')}"
    if config.num_steps is not None:
        steps += f", {count(config.num_steps, 'step')} in all"
    console.say(
        "training",
        f"{steps}, batch size {config.batch_size}, "
        f"{config.schedule} learning rate {config.learning_rate:g}, precision {config.precision}",
    )
    printed = {"num_epochs", "num_steps", "validate_every", "batch_size", "schedule", "learning_rate", "precision"}
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


def say_plan(session: Session, plan: WorkerPlan) -> int:
    """Print the model and the workers that train it; return the number of parameters."""
    job, console, cluster = session.job, session.console, session.cluster
    model, why_whole = _created(job)
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
    _say_memory(session, plan, model, why_whole)
    cores = usable_cores()
    if cluster.is_local and not plan.use_gpu and plan.num_workers > cores:
        shared = f"{plan.num_workers} workers share {cores} cores"
        console.say("note", f"{shared}: --num-workers {cores} would be at least as fast")
    slice_size = job.train.batch_size // plan.num_workers
    if plan.use_gpu and slice_size < _SMALL_ON_GPU:
        examples = f"{slice_size} {job.workload.nouns} a step"
        console.say("note", f"{examples} leave a GPU idle: a larger --batch-size is faster")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    console.waiting("starting workers …")
    return num_parameters


def _created(job: Job) -> tuple[nn.Module, str]:
    """Return a new model: one to be sharded without memory for its tensors or, if it cannot be created so, why not."""
    from mnist_ray.parallel.sharding import on_meta

    without_memory, why_whole = on_meta(job.workload) if job.train.strategy == "fsdp" else (None, "")
    return without_memory or job.workload.create_model(), why_whole


def _say_memory(session: Session, plan: WorkerPlan, model: nn.Module, why_whole: str) -> None:
    """Print what each worker holds of a sharded model. Raises UsageError if the nodes have no memory for it."""
    from mnist_ray.parallel import sharding

    workload, config = session.job.workload, session.job.train
    held = sharding.held_bytes(model, workload, config, plan.num_workers)
    if sharding.is_wanted(config, plan.num_workers):
        units = sharding.units_of(workload, model)
        largest = max(sum(parameter.nbytes for parameter in unit.parameters()) for unit in units)
        whole = sharding.held_bytes(model, workload, config, 1)
        session.console.say(
            "sharding",
            f"{count(len(units), 'unit')} of up to {size_of(largest)}; each worker holds {size_of(held)} of weights, "
            f"gradients and optimizer state, not {size_of(whole)}",
        )
        if why_whole:
            session.console.say("note", f"each worker creates the whole model before it is sharded: {why_whole}")
    check_memory(plan, suitable(session.cluster.nodes, plan.labels), held)


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
        """Mark the end of the start, of an epoch's training, and of its validation."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.mark("start")
        if isinstance(event, (EpochFinished, Validated)):
            self.mark("training" if isinstance(event, EpochFinished) else "validation")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and the total."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}
