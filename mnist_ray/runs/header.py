"""The lines at a run's beginning: those that need neither Ray nor torch are on the screen before either is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mnist_ray.cluster.plan import Cluster, WorkerPlan, usable_cores
from mnist_ray.display.console import RunConsole
from mnist_ray.runs.job import Job
from mnist_ray.wording import count, described
from mnist_ray.workload.data import Parts


@contextlib.contextmanager
def announced(job: Job, data: Parts) -> Iterator[RunConsole]:
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
            console.say("settings", described(changed))
        console.say("results", job.run.uri)
        console.waiting("starting Ray …")
        yield console


def say_data(console: RunConsole, job: Job, data: Parts) -> None:
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
