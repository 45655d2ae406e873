"""A run's first lines, which come before Ray and torch where they need neither; and its clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from mnist_ray.cluster.plan import Cluster, WorkerPlan, usable_cores
from mnist_ray.errors import count, format_settings
from mnist_ray.run.console import RunConsole
from mnist_ray.run.job import Job
from mnist_ray.training.events import EpochFinished, Event, Started
from mnist_ray.workload.data import Splits


@contextlib.contextmanager
def announced(job: Job, data: Splits) -> Iterator[RunConsole]:
    """Say what is going to be trained, and show what is waited for."""
    with RunConsole(job.workload, job.train.num_epochs, quiet=job.output.quiet) as console:
        config, steps = job.train, count(job.train.num_steps(len(data.train)), "step")
        console.say("run", job.run.name)
        say_data(console, job, data)
        console.say(
            "training",
            f"{count(config.num_epochs, 'epoch')} of {steps}, batch size {config.batch_size}, "
            f"{config.schedule} learning rate {config.learning_rate:g}, precision {config.precision}",
        )
        said = ("num_epochs", "batch_size", "schedule", "learning_rate", "precision")
        changed = {name: value for name, value in job.workload.changed(job.values).items() if name not in said}
        if changed:
            console.say("settings", format_settings(changed))
        console.say("results", job.run.uri)
        console.waiting("starting Ray …")
        yield console


def say_data(console: RunConsole, job: Job, data: Splits) -> None:
    """Print the line of the header that tells of the data, after what the user is to know before."""
    for note in job.notes:
        console.say("note", note)
    counts = f"{len(data.train):,} {job.workload.nouns} to train on, {len(data.validation):,} for validation"
    console.say("data", f"{data.name}: {counts}, {len(data.test):,} to test")


def say_dashboard(console: RunConsole, cluster: Cluster) -> None:
    """Say where Ray's dashboard is, for as long as the job runs."""
    console.say("dashboard", f"http://{cluster.dashboard}" if cluster.dashboard else "this cluster has none")


def say_plan(console: RunConsole, job: Job, cluster: Cluster, plan: WorkerPlan) -> None:
    """Say what trains, on what, once that is known, and show what is waited for."""
    model = job.workload.create_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    console.say("model", f"{type(model).__name__}, {num_parameters:,} parameters")
    gpu = " and 1 GPU" if plan.use_gpu else ""
    where = "a local Ray" if cluster.is_local else f"a Ray cluster of {count(len(cluster.nodes), 'node')}"
    cpus = count(plan.cpus_per_worker, "CPU")
    if job.output.dashboard:
        say_dashboard(console, cluster)
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
