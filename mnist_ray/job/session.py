"""A job's session: what its steps need, from the connection to Ray until the end, which is explained."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction

from mnist_ray import process
from mnist_ray.cluster.plan import Cluster
from mnist_ray.config import WorkerConfig
from mnist_ray.data.data import Split, Splits
from mnist_ray.errors import JobError, TrainingStoppedError, UnreadableDataError, UsageError, with_place
from mnist_ray.job.job import Job, check_free
from mnist_ray.job.lease import owned
from mnist_ray.provenance import Repository, state_of
from mnist_ray.report.console import RunConsole
from mnist_ray.schema import RESULT_FILE
from mnist_ray.signals import if_ended
from mnist_ray.storage import STORAGE_ERRORS
from mnist_ray.text import size_of
from mnist_ray.training.events import EpochFinished, Event, Started, Validated
from ray_fork.starting import Forking


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
class Session:
    """What every step of a job needs, from the connection to Ray on."""

    job: Job
    workers: WorkerConfig
    data: Splits
    console: RunConsole
    clock: Clock
    cluster: Cluster
    repository: Future[Repository | None]  # that of the user's code
    leave: Callable[[], None] = lambda: None  # begin to disconnect from Ray, which is no longer needed

    @property
    def is_here(self) -> bool:
        """Whether this process trains, without Ray."""
        return self.workers.num_workers == 0


@contextlib.contextmanager
def opened(
    forking: Forking,
    job: Job,
    data: Splits,
    console: RunConsole,
    clock: Clock,
    preload: str,
    batch_sizes: Sequence[int] = (),
) -> Iterator[Session]:
    """Own the job's run until the end, connect to Ray, and meanwhile send a batch through the workload.

    ``preload``: the module that workers need. ``batch_sizes``: those of a sweep. Raises UsageError if another job owns
    the run or something in the user's code is wrong, and JobError if Ray does not start.
    """
    folder = job.workload.source.place
    repository = process.in_thread(lambda: state_of(folder))
    say = functools.partial(console.say, "note")
    too_large = _too_large(job) if job.train.strategy == "fsdp" else ""
    if too_large:
        say(f"skipping the trial batch: {too_large}")

    notes = list[str]()

    def meanwhile() -> None:
        with process.without_collector():
            if not too_large:
                from mnist_ray.job.dry_run import notes_of_transforms  # imports torch

                _try_batch(job, data, batch_sizes)
                notes.extend(notes_of_transforms(job.workload, data.validation))
            importlib.import_module(preload)  # with Ray Train, which ray.init does not import

    with owned(job.run, console.waiting):
        # Again: another job may have created the run meanwhile.
        check_free(job.run, resume=job.output.resume, is_resumed=job.is_resumed)
        if job.is_resumed:
            if_ended(f"; to resume: {job.resume_with}")
        with process.without_collector():
            from mnist_ray.cluster.connection import Connection  # imports Ray, after the header is printed

        connection = Connection(job.workers, forking, verbose=job.output.verbose)
        with connection.opened(say, meanwhile) as cluster:
            for note in notes:
                say(note)
            yield Session(job, job.workers, data, console, clock, cluster, repository, connection.leave)


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


def _try_batch(job: Job, data: Splits, batch_sizes: Sequence[int]) -> None:
    """Send a batch through the job's workload. Raises UsageError."""
    from mnist_ray.job.dry_run import NUM_EXAMPLES, try_batch  # imports torch

    train, num_workers, num_streams = data.train, job.workers.num_workers or 1, job.train.num_streams
    smallest = Fraction(1, job.train.reproducible_chunks or num_workers)
    if train.is_in_blocks and not job.train.reproducible:  # each worker has some of the streams
        smallest = Fraction(num_streams // num_workers, num_streams)
    sizes = batch_sizes or [job.train.batch_size]
    if train.is_stream:
        train, sizes = Split(train.examples.first(2 * NUM_EXAMPLES), transforms=train.transforms), ()
        if len(train) == 0:
            raise UsageError(f"{type(job.workload).__name__}: the stream of training examples is empty")
    try_batch(job.workload, train, job.train, sizes, smallest, num_workers, is_validated=len(data.validation) > 0)


def console_of(job: Job) -> RunConsole:
    """Return a run's console."""
    return RunConsole(job.workload, job.train.num_epochs, quiet=job.output.quiet)
