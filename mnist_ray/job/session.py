"""A job from its first line of output to its last. The first lines are printed before Ray and torch are imported."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction

from mnist_ray import extras, process
from mnist_ray.cluster import environment
from mnist_ray.cluster.plan import Cluster, threads_per_worker
from mnist_ray.config import WorkerConfig, shown
from mnist_ray.data.data import Blocks, Split, Splits
from mnist_ray.data.streamed import Streamed
from mnist_ray.errors import JobError, TrainingStoppedError, UnreadableDataError, UsageError, with_place
from mnist_ray.job.job import Job, check_free
from mnist_ray.job.lease import owned
from mnist_ray.process import usable_cores
from mnist_ray.report.console import RunConsole
from mnist_ray.repository import Repository, state_of
from mnist_ray.signals import if_ended, take_signals
from mnist_ray.storage import RESULT_FILE, STORAGE_ERRORS
from mnist_ray.text import size_of
from mnist_ray.training.events import EpochFinished, Event, Started, Validated
from ray_fork.starting import Forking, prepared_forking


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
            self.mark("training")
        if isinstance(event, Validated):  # events of a short epoch come together
            own = min(event.seconds, self._parts["training"])
            self._parts["training"] -= own
            self._parts["validation"] = self._parts.get("validation", 0.0) + own

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and the total."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}


@dataclass(frozen=True)
class Start:
    """What a job has before its data are loaded."""

    clock: Clock
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
    repository: Future[Repository | None]  # that of the user's code
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
def started(job: Job, preload: str) -> Iterator[Start]:
    """Set this process up, and start a fork server. However the job ends, report how to resume if that may help."""
    clock, workers = Clock(), job.workers
    cores = usable_cores()
    num_threads = threads_per_worker(cores, cores, 1, job.train.batch_size)
    environment.prepare(verbose=job.output.verbose, plain=workers.plain_ray, num_threads=num_threads)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(ending_explained(job))
        forking = None
        if workers.num_workers != 0:
            is_wanted = workers.fork_workers == "auto" and not workers.plain_ray
            prepared = prepared_forking(preload, *environment.IMPORTED_LATE, is_wanted=is_wanted)
            forking = at_the_end.enter_context(prepared)
        clock.mark("start")
        yield Start(clock, preload, forking)


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
            # Again: another job may have created the run meanwhile.
            check_free(job.run, resume=job.output.resume, is_resumed=job.is_resumed)
            if job.is_resumed:
                if_ended(f"; to resume: {job.resume_with}")
            with connected(start, job, data, console, batch_sizes) as session:
                yield session


@contextlib.contextmanager
def connected(
    start: Start, job: Job, data: Splits, console: RunConsole, batch_sizes: Sequence[int] = ()
) -> Iterator[Session]:
    """Send a batch through the workload, and join a cluster or start a local Ray, except with ``--num-workers 0``.

    An error in the user's code ends the start of Ray. Raises UsageError and JobError.
    """
    folder = job.workload.source.place
    repository = process.in_thread(lambda: state_of(folder))
    unused, note, reason = None, "", _too_large(job) if job.train.strategy == "fsdp" else ""
    if reason:
        console.say("note", f"skipping the trial batch: {reason}")

    def meanwhile() -> None:
        nonlocal unused, note
        with process.without_collector():
            if not reason:
                from mnist_ray.job.dry_run import note_of_transforms  # imports torch

                unused = _try_batch(job, data.train, batch_sizes)
                note = note_of_transforms(job.workload, data.validation)
            importlib.import_module(start.preload)  # with Ray Train, which ray.init does not import

    if job.workers.num_workers == 0:
        meanwhile()
        if note:
            console.say("note", note)
        cluster = Cluster(is_local=True, nodes=(), log_folder="")
        yield Session(job, job.workers, data, console, start.clock, cluster, repository, unused)
        return
    with process.without_collector():
        from mnist_ray.cluster.connect import connect  # imports Ray, after the header is printed

    with connect(job.workers, start.forking, verbose=job.output.verbose, meanwhile=meanwhile) as cluster:
        for each in filter(None, (note, *cluster.notes, extras.note(plain=job.workers.plain_ray))):
            console.say("note", each)
        if job.workers.use_gpu == "auto":
            from mnist_ray.cluster.devices import without_unusable_gpus  # imports torch

            cluster = without_unusable_gpus(cluster, functools.partial(console.say, "note"))
        yield Session(job, job.workers, data, console, start.clock, cluster, repository, unused)


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
    return f"the model needs {size_of(needed)}, but only {size_of(free)} are free here" if needed > free else ""


def _try_batch(job: Job, train: Split, batch_sizes: Sequence[int]) -> set[str] | None:
    """Send a batch through the job's workload; return like ``try_batch``. Raises UsageError."""
    from mnist_ray.job.dry_run import NUM_EXAMPLES, try_batch  # imports torch

    num_workers, num_streams = job.workers.num_workers or 1, job.train.num_streams
    smallest = Fraction(1, job.train.reproducible_chunks or num_workers)
    if isinstance(train.examples, Blocks) and not job.train.reproducible:  # each worker has some of the streams
        smallest = Fraction(num_streams // num_workers, num_streams)
    sizes = batch_sizes or [job.train.batch_size]
    if isinstance(train.examples, Streamed):
        train, sizes = Split(train.examples.first(2 * NUM_EXAMPLES)), ()
        if len(train) == 0:
            raise UsageError(f"{type(job.workload).__name__}: the stream of training examples is empty")
    unused = try_batch(job.workload, train, job.train, sizes, smallest, num_workers)
    if given := sorted(job.given & (unused or set())):
        own = f"{type(job.workload).__name__}'s loss, optimizer and schedule"
        raise UsageError(f"{shown(given[0])} has no effect: {own} do not use it; leave it out")
    return unused


def console_of(job: Job) -> RunConsole:
    """Return a run's console."""
    return RunConsole(job.workload, job.train.num_epochs, quiet=job.output.quiet)
