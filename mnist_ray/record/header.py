"""The first lines of a run: its data, training, model and workers."""

from __future__ import annotations

from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.data.data import Splits
from mnist_ray.job.job import Job, report_command
from mnist_ray.job.session import Session
from mnist_ray.report.console import RunConsole
from mnist_ray.report.run_files import Run
from mnist_ray.schema import RESULT_FILE
from mnist_ray.text import count, format_settings
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import IN_WORDS

_PRINTED = {"num_epochs", "num_steps", "validate_every", "batch_size", "lr_schedule", "learning_rate", "precision"}


def say_run(console: RunConsole, job: Job, data: Splits) -> None:
    """Print the header of a run: data, training, settings."""
    config, workload = job.train, job.workload
    console.say("run", job.run.name)
    say_data(console, job, data)
    steps = f"{count(config.num_epochs, 'epoch')} of {count(config.steps_per_epoch(len(data.train)), 'step')}"
    if config.num_steps is not None:
        steps += f", {count(config.num_steps, 'step')} in all"
    elif config.validate_every is not None:
        steps += f", validated every {count(config.validate_every, 'step')}"
    has_own = type(workload).create_scheduler is not Workload.create_scheduler
    rate = f"{'own schedule,' if has_own else config.lr_schedule} learning rate {config.learning_rate:g}"
    best = f", best by {workload.monitor.name}" if len(data.validation) else ""
    console.say("training", f"{steps}, batch size {config.batch_size}, {rate}, precision {config.precision}{best}")
    defaults = {name: value for name, value in workload.defaults.items() if name not in _PRINTED}
    if changed := {name: job.values[name] for name, default in defaults.items() if job.values[name] != default}:
        console.say("settings", format_settings(changed))
    console.say("results", job.run.uri)
    console.waiting("starting Ray …")


def say_data(console: RunConsole, job: Job, data: Splits) -> None:
    """Print a job's notes, and the sizes of its data."""
    for note in job.notes:
        console.say("note", note)
    nouns, is_stream = job.workload.nouns, data.train.is_stream
    to_train_on = f"a stream of {nouns}" if is_stream else f"{len(data.train):,} {nouns}"
    others = "".join(f", {len(split):,} of {split.name}" for split in data.others)
    first = f" of {data.validation.name}" if data.validation.name else ""
    counts = f"{to_train_on} to train on, {len(data.validation):,}{first} for validation{others}"
    to_test = f"{len(data.test):,} to test" if data.evaluated == "test" else "none to test"
    console.say("data", f"{data.name}: {counts}, {to_test}")


def say_result(console: RunConsole, job: Job) -> None:
    """Print the result of a run that is finished."""
    record = Run(job.run, job.workload)
    console.say("run", f"{job.run.name} is finished")
    console.result(IN_WORDS[record.evaluated], job.workload.format(record.metrics))
    console.result("result", job.run.inside(RESULT_FILE).uri)
    if missing := report_command(job.run):
        console.say("report", f"to write it: {missing}")


def say_plan(session: Session, plan: WorkerPlan) -> int:
    """Print the model and the workers that train it; return the number of parameters."""
    from mnist_ray.parallel import sharding  # imports torch

    job, console, cluster = session.job, session.console, session.cluster
    # A model to be sharded has no memory for its tensors here, if that is possible.
    without_memory, why_whole = sharding.on_meta(job.workload) if job.train.strategy == "fsdp" else (None, "")
    model = without_memory or job.workload.create_model()
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
    if why_whole and plan.num_workers > 1:
        console.say("note", f"each worker creates the whole model before it is sharded: {why_whole}")
    if plan.must_scale_up:
        console.say("note", "the cluster is too small now; waiting for it to start nodes")
    console.waiting("starting workers …")
    return num_parameters
