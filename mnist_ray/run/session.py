"""A job from its first line to its last. Light: the first lines are on the screen before Ray and torch are there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from mnist_ray.cluster import environment
from mnist_ray.cluster.plan import Cluster, WorkerPlan, plan_workers, usable_cores
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError, count, format_settings
from mnist_ray.run.console import RunConsole
from mnist_ray.run.job import Job, check_free
from mnist_ray.storage import STORAGE_ERRORS
from mnist_ray.training.events import EpochFinished, Event, Started
from mnist_ray.workload.data import Splits, splits_of, subset
from mnist_ray.workload.loading import digests_of
from mnist_ray.workload.loading import load_data as load_data_of
from ray_fork.starting import prepared_forking

Self = TypeVar("Self", bound="Session")


class Session:
    """The state that every step of a job's story needs. Use it as a context: it adds to an interrupt how to go on."""

    data: Splits
    console: RunConsole
    cluster: Cluster
    plan: WorkerPlan

    def __init__(self, job: Job, modules: str, workers: WorkerConfig | None = None) -> None:
        self.job = job
        self.workers = workers or job.workers
        self.clock = Clock()
        self._modules = modules
        self._at_the_end = contextlib.ExitStack()

    @property
    def is_here(self) -> bool:
        """Whether this process trains, without Ray."""
        return self.workers.num_workers == 0

    def __enter__(self: Self) -> Self:
        environment.prepare(verbose=self.job.output.verbose)
        self._at_the_end.enter_context(saying_the_way_on(self.job))
        if not self.is_here:
            self._forking = self._at_the_end.enter_context(
                prepared_forking(self._modules, is_wanted=self.workers.fork_workers == "auto")
            )
        self.clock.mark("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._at_the_end.__exit__(kind, error, trace)

    def begin(
        self,
        job: Job,
        data: Splits,
        console: RunConsole | None = None,
        say_header: Callable[[Session], None] | None = None,
    ) -> None:
        """Print the header of a job whose data are loaded, and own its run until the end.

        Raises JobError if the storage cannot be written, UsageError if the run is another job's.
        """
        from mnist_ray.run.lease import owned  # imports psutil, which the header need not wait for

        self.job, self.data = job, data
        job.run.check_writable()
        self.clock.mark("data")
        self.console = self._at_the_end.enter_context(console or console_of(job))
        (say_header or say_run)(self)
        self._at_the_end.enter_context(owned(job.run, self.console.waiting))
        check_free(job.run, resume=job.output.resume)  # once more, as another job may have made it meanwhile

    def dry_run(self, batch_sizes: Sequence[int] = ()) -> Callable[[], None]:
        """Let one batch go through the workload; return the rest, to be done while Ray starts: imports, and maybe that.

        A user's own workload is tried now, so that a mistake is said before anything starts. A workload of this package
        was tried when it was built, and need not be waited for. ``batch_sizes`` are those that a sweep tries. Raises
        UsageError.
        """

        def try_it() -> None:
            from mnist_ray.run.dry_run import try_batch  # imports torch: this is where it is first needed

            try_batch(self.job, self.data.train, batch_sizes)

        is_tried_now = not type(self.job.workload).__module__.startswith("mnist_ray.")
        if is_tried_now:
            try_it()

        def meanwhile() -> None:
            importlib.import_module(self._modules)  # and Ray Train, of which ray.init imports nothing meanwhile
            if not is_tried_now:
                try_it()

        return meanwhile

    @contextlib.contextmanager
    def ray(self, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Connect to a cluster or start a local Ray, do ``meanwhile`` beside that, and plan the workers.

        With ``--num-workers 0`` there is no Ray: only ``meanwhile`` is done.
        """
        if self.is_here:
            meanwhile()
            self.cluster, self.plan = Cluster(is_local=True, nodes=(), log_folder=""), WorkerPlan(0, 0, False, False)
            yield
            return
        from mnist_ray.cluster.connect import connect  # imports Ray, once the header is on the screen

        output = {"verbose": self.job.output.verbose, "dashboard": self.job.output.dashboard}
        with connect(self.workers, self._forking, **output, meanwhile=meanwhile) as self.cluster:
            self.plan = plan_workers(self.workers, self.cluster, self.job.train.chunks)
            yield


@contextlib.contextmanager
def saying_the_way_on(job: Job) -> Iterator[None]:
    """Add to an interrupt how to go on after it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        has_begun = True
        with contextlib.suppress(*STORAGE_ERRORS):  # storage that is away now may hold something
            has_begun = job.run.exists()
        advice = f"to go on: {job.resume_with}" if has_begun else "nothing is saved yet: start it again"
        raise KeyboardInterrupt(f"interrupted; {advice}") from interrupt


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
    said = {"num_epochs", "batch_size", "schedule", "learning_rate", "precision"}
    defaults = {name: value for name, value in job.workload.defaults.items() if name not in said}
    changed = {name: job.values[name] for name, default in defaults.items() if job.values[name] != default}
    if changed:
        console.say("settings", format_settings(changed))
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")


def say_data(console: RunConsole, job: Job, data: Splits) -> None:
    """Print the notes of a job, and the line of its data."""
    for note in job.notes:
        console.say("note", note)
    counts = f"{len(data.train):,} {job.workload.nouns} to train on, {len(data.validation):,} for validation"
    console.say("data", f"{data.name}: {counts}, {len(data.test):,} to test")


def say_dashboard(console: RunConsole, cluster: Cluster) -> None:
    """Say where Ray's dashboard is, for as long as the job runs."""
    console.say("dashboard", f"http://{cluster.dashboard}" if cluster.dashboard else "this cluster has none")


def say_plan(session: Session) -> None:
    """Print the model and the workers that train it."""
    job, console, cluster, plan = session.job, session.console, session.cluster, session.plan
    model = job.workload.create_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    console.say("model", f"{type(model).__name__}, {num_parameters:,} parameters")
    gpu = " and 1 GPU" if plan.use_gpu else ""
    where = "a local Ray" if cluster.is_local else f"a Ray cluster of {count(len(cluster.nodes), 'node')}"
    cpus = count(plan.cpus_per_worker, "CPU")
    if job.output.dashboard:
        say_dashboard(console, cluster)
    if session.is_here:
        console.say("workers", "none: this process trains, without Ray")
        return
    console.say("workers", f"{plan.num_workers}, each with {cpus}{gpu}, on {where}")
    cores = usable_cores()
    if cluster.is_local and not plan.use_gpu and plan.num_workers > cores:
        shared = f"{plan.num_workers} workers share {cores} cores"
        console.say("note", f"{shared}: --num-workers {cores} would be at least as fast")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    console.waiting("starting workers …")


class Clock:
    """Counts the seconds of a job's parts, from its creation on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._has_trained = False

    def mark(self, name: str) -> None:
        """Count the time since the last mark as that of ``name``."""
        now = time.perf_counter()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, event: Event) -> None:
        """Tell the start from the training, and that from the wait for the last validation."""
        if isinstance(event, Started) and not self._has_trained:
            self._has_trained = True
            self.mark("start")
        if isinstance(event, EpochFinished):
            self.mark("training")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, and in all."""
        parts = {name: round(seconds, 3) for name, seconds in self._parts.items()}
        return {**parts, "total": round(self._last - self._start, 3)}


def load_data(job: Job, batch_sizes: Sequence[int] = ()) -> tuple[Job, Splits]:
    """Return the job with notes about its data, and the data; its workload has their metadata from now on.

    ``batch_sizes`` are those that a sweep tries. Raises UsageError and JobError; UsageError also if a resumed run began
    with other data.
    """
    splits = subset(splits_of(load_data_of(job.workload), job.train.validation_size), job.train)
    notes = [*_check_same_data(job, splits), *_on_schedule(job)]
    for size in batch_sizes or [job.train.batch_size]:
        if size > len(splits.train):
            name, noun = "--sweep: batch size" if batch_sizes else "--batch-size", job.workload.nouns
            raise UsageError(f"{name} {size:,} is larger than the {len(splits.train):,} {noun} to train on")
    if job.train.early_stop is not None and len(splits.validation) == 0:
        raise UsageError("--early-stop watches the validation; hold some examples out by --validation-size")
    return dataclasses.replace(job, notes=(*job.notes, *notes)), splits


def _check_same_data(job: Job, splits: Splits) -> tuple[str, ...]:
    """Raise UsageError if a resumed run began with other data; return a note if that is not known."""
    if not job.origin:
        return ()
    then, now = job.origin.get("data", {}), digests_of(splits)  # it may have begun before digests were kept
    differing = [part for part in then if None not in (then[part], now.get(part)) and then[part] != now[part]]
    if differing:
        raise UsageError(
            f"--resume: run {job.run.name} began with other data than {splits.name} ({', '.join(differing)}); "
            "bring them back, or start another run"
        )
    if then and None in now.values():
        return ("whether the data are those that the run began with is not known: they name no files",)
    return ()


def _on_schedule(job: Job) -> Iterator[str]:
    """Yield a note if the schedule does not fit a training that may stop early."""
    if job.train.early_stop is not None and job.train.schedule == "one-cycle":
        yield (
            f"the one-cycle schedule is {count(job.train.num_epochs, 'epoch')} long: where training stops early, the "
            "learning rate has not come down; --schedule constant has no such end"
        )
