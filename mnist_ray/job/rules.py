"""The rules between settings, a workload and its data, as one table: of settings first, then of data.

Errors and notes come from it, and a page of the reference. A setting that has no effect is a mistake, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mnist_ray.config import shown
from mnist_ray.data.data import Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import UsageError
from mnist_ray.layers import FLAGS
from mnist_ray.ray_versions import is_at_least, ray_version
from mnist_ray.settings import values_of
from mnist_ray.text import count

if TYPE_CHECKING:
    from mnist_ray.job.job import Job

_NO_DATA: Any = None


@dataclass(frozen=True)
class Rule:
    """What is wrong with some settings, and what to do."""

    settings: tuple[str, ...]  # that it reads or, if they have no effect, that it is about
    is_broken: Callable[[Job, Splits], bool]
    problem: str  # with {…} for settings and for what ``_facts`` has
    fix: str
    kind: Literal["error", "no effect", "note"] = "error"
    """``no effect``: an error if the setting is given with this command or call. ``note``: only printed."""


def _no_effect(settings: tuple[str, ...], unless: Callable[[Job, Splits], bool], reason: str) -> Rule:
    """Return the rule that settings have no effect ``unless`` a condition holds."""
    return Rule(
        settings, lambda job, data: not unless(job, data), f"has no effect{reason}", "leave it out", "no effect"
    )


def _no_effect_in_optimizer(name: str) -> Rule:
    """Return the rule that a setting has no effect if the optimizer does not use it."""
    return _no_effect((name,), lambda job, _: name not in job.unused, ": {optimizer} does not use it")


def _epochs_come_last(job: Job) -> bool:
    """Return whether a place that is at least as strong as that of --num-steps asks for epochs."""
    steps, epochs = job.placed.get("num_steps"), job.placed.get("num_epochs")
    if job.train.num_steps is None or steps is None or epochs is None:
        return False
    return epochs.rank > steps.rank or epochs.place == steps.place == FLAGS


OF_SETTINGS = (
    Rule(
        ("num_steps", "num_epochs"),
        lambda job, _: _epochs_come_last(job),
        "--num-steps {num_steps} replaces --num-epochs",
        "leave one of them out, or add --num-steps none",
    ),
    Rule(
        ("fold", "folds"),
        lambda job, _: job.train.fold is not None and job.train.fold > (job.train.folds or 0),
        "--set fold={fold} needs at least as many folds",
        "set --folds",
    ),
    Rule(
        ("folds", "overfit_batches"),
        lambda job, _: job.train.folds is not None and job.train.overfit_batches is not None,
        "--overfit-batches tests on the training examples",
        "leave --folds out",
    ),
    Rule(
        ("lr_schedule", "warmup_steps"),
        lambda job, _: job.train.lr_schedule not in ("constant", "cosine", "linear") and job.train.warmup_steps > 0,
        "--set warmup_steps: {lr_schedule} has a warm-up of its own, or none",
        "choose another --lr-schedule",
    ),
    Rule(
        ("strategy", "compile"),
        lambda job, _: job.train.strategy == "fsdp" and job.train.compile,
        "--strategy fsdp does not work with --compile, which cannot trace how units are gathered",
        "leave one of them out",
    ),
    Rule(
        ("strategy",),
        lambda job, _: job.train.strategy == "fsdp" and job.workload.has_unused_parameters,
        "--strategy fsdp needs all parameters in each step",
        "call every expert, also on no rows, and leave has_unused_parameters out",
    ),
    Rule(
        ("reproducible", "micro_batch_size"),
        lambda job, _: (
            job.workload.compares_examples and (job.train.reproducible or job.train.micro_batch_size is not None)
        ),
        "--reproducible and --micro-batch-size cut batches into parts, but {workload}'s loss compares their examples",
        "leave both out",
    ),
    Rule(
        ("reproducible", "num_chunks", "num_workers"),
        lambda job, _: job.train.reproducible and (job.workers.num_workers or 1) > job.train.num_chunks,
        "--reproducible: {num_workers} workers cannot share the {num_chunks} chunks of a batch",
        "lower --num-workers, or start a run with more num_chunks",
    ),
    Rule(
        ("reproducible", "use_gpu"),
        lambda job, _: job.train.reproducible and job.workers.use_gpu == "yes",
        "--reproducible computes on CPUs only",
        "leave --use-gpu out",
    ),
    Rule(
        ("reproducible", "strategy"),
        lambda job, _: job.train.reproducible and job.train.strategy == "fsdp",
        "--reproducible adds up whole gradients in a fixed order",
        "use --strategy ddp",
    ),
    Rule(
        ("reproducible", "micro_batch_size"),
        lambda job, _: job.train.reproducible and job.train.micro_batch_size is not None,
        "--reproducible computes one chunk at a time",
        "use --set num_chunks, not --micro-batch-size",
    ),
    Rule(
        ("reproducible", "compile"),
        lambda job, _: job.train.reproducible and job.train.compile,
        "--reproducible does not work with --compile, whose kernels may give different bits",
        "leave one of them out",
    ),
    Rule(
        ("min_workers",),
        lambda job, _: job.workers.min_workers is not None and not is_at_least("2.55"),
        "--set min_workers needs Ray 2.55 or later, not {ray}",
        "leave it out, or upgrade Ray",
    ),
    _no_effect(
        (
            *("min_workers", "autoscaling", "max_failures", "fork_workers"),
            *("plain_ray", "hang_timeout_s", "max_concurrent_trials"),
        ),
        lambda job, _: job.workers.num_workers != 0,
        " with --num-workers 0, which trains without Ray",
    ),
    _no_effect(("no_test",), lambda job, _: job.train.folds is None, " with --folds: each run is tested on its part"),
    _no_effect(("num_chunks",), lambda job, _: job.train.reproducible, " without --reproducible"),
    *map(_no_effect_in_optimizer, ("beta1", "beta2", "momentum")),
    _no_effect(
        ("num_confirmed",),
        lambda job, _: not job.train.is_several or job.asked.get("num_confirmed") == 0,
        ": each configuration already has several runs, of --num-seeds or --folds",
    ),
)
OF_DATA = (
    Rule(
        ("num_steps",),
        lambda job, data: data.train.is_stream and job.train.num_steps is None,
        "{workload} trains on a stream without a length",
        "set --num-steps",
    ),
    Rule(
        ("no_test", "validation_size"),
        lambda _, data: len(data.test) == 0,
        "there is neither a test nor a validation set, so nothing evaluates the trained model",
        "give Data.test or Data.validation, or leave --no-test and --validation-size 0 out",
    ),
    Rule(
        ("limit", "validation_size", "folds", "overfit_batches"),
        lambda _, data: data.train.weights is not None and not data.train.weights.any(),
        "Data(weights=…): the examples to train on all have weight 0",
        "use more of the data, or other weights",
    ),
    Rule(
        ("warmup_steps", "num_epochs", "num_steps", "batch_size"),
        lambda job, data: job.train.warmup_steps >= job.train.total_steps(len(data.train)),
        "--set warmup_steps={warmup_steps} must be below the {steps:,} steps of the run",
        "lower it",
    ),
    Rule(
        ("early_stopping_patience", "validation_size", "overfit_batches"),
        lambda job, data: job.train.early_stopping_patience is not None and len(data.validation) == 0,
        "--early-stopping-patience needs validation",
        "leave --validation-size 0 and --overfit-batches out",
    ),
    Rule(
        ("reproducible", "num_streams", "num_chunks"),
        lambda job, data: (
            job.train.reproducible and data.train.is_in_blocks and job.train.num_chunks != job.train.num_streams
        ),
        "--reproducible: data in blocks need num_streams ({num_streams}) and num_chunks ({num_chunks}) to be equal",
        "set both",
    ),
    Rule(
        ("num_workers", "num_streams"),
        lambda job, data: data.train.is_in_blocks and (job.workers.num_workers or 1) > job.train.num_streams,
        "--num-workers {num_workers} is more than the {num_streams} streams of blocks (num_streams)",
        "lower it, or start a run with more num_streams",
    ),
    _no_effect(
        ("num_streams", "read_ahead_mib"),
        lambda _, data: data.train.is_in_blocks,
        ": the data are not in blocks",
    ),
    Rule(
        ("num_streams",),
        lambda job, data: data.train.is_in_blocks and len(data.train.examples.sizes) < job.train.num_streams,
        "{blocks} for {num_streams} streams of blocks (num_streams): some are read twice",
        "write smaller ones",
        "note",
    ),
    Rule(
        ("early_stopping_patience", "lr_schedule"),
        lambda job, _: job.train.early_stopping_patience is not None and job.train.lr_schedule != "constant",
        "the {lr_schedule} schedule spans all epochs: if training stops early, the learning rate has not come down",
        "--lr-schedule constant avoids that",
        "note",
    ),
)


def check(job: Job, data: Splits | None = None) -> None:
    """Raise UsageError if settings cannot be combined or, with ``data``, do not fit them."""
    for rule in OF_SETTINGS if data is None else OF_DATA:
        if rule.kind == "error" and rule.is_broken(job, data or _NO_DATA):
            raise UsageError(f"{_problem(rule, job, data)}{_places(rule, job)}", fix=rule.fix)


def check_used(jobs: Sequence[Job], names: Collection[str], data: Splits | None = None) -> None:
    """Raise UsageError if one of the named settings has no effect in any of the jobs, such as a sweep's trials."""
    for rule in OF_SETTINGS if data is None else OF_DATA:
        if rule.kind == "no effect" and all(rule.is_broken(job, data or _NO_DATA) for job in jobs):
            for name in sorted({*rule.settings} & {*names}):
                raise UsageError(f"{shown(name)} {_problem(rule, jobs[0], data)}", fix=rule.fix)


def check_against_data(job: Job, data: Splits, batch_sizes: Sequence[int] = ()) -> Job:
    """Return the job with notes about its data, and with a batch size that they can fill.

    ``batch_sizes``: those of a sweep. Raises UsageError if the settings do not fit the data, or if a resumed run was
    started with different data.
    """
    num_train, largest = len(data.train), max(batch_sizes or [job.train.batch_size])
    notes = _check_same_data(job, data)
    if largest > num_train:
        notes += _check_batch_size(job, num_train, largest, is_of_sweep=len(batch_sizes) > 0)
    with_largest = dataclasses.replace(job.train, batch_size=min(largest, num_train))
    check(dataclasses.replace(job, train=with_largest), data)
    check_used([job], job.given, data)
    if job.train.batch_size > num_train:
        job = job.with_values({"batch_size": num_train})
    noted = [rule for rule in OF_DATA if rule.kind == "note" and rule.is_broken(job, data)]
    notes += [f"{_problem(rule, job, data)}; {rule.fix}" for rule in noted]
    return dataclasses.replace(job, notes=(*job.notes, *notes))


def _check_batch_size(job: Job, num_train: int, largest: int, *, is_of_sweep: bool) -> list[str]:
    """Return a note that a batch has all examples. Raises UsageError if the user asked for more."""
    there, name = f"{num_train:,} {job.workload.nouns} to train on", "sweep" if is_of_sweep else "batch_size"
    if name in job.given:
        asked = "--sweep: batch size" if is_of_sweep else "--batch-size"
        raise UsageError(f"{asked} {largest:,} is larger than the {there}")
    return [f"batch size {num_train:,}, not {largest:,}: there are only {there}"]


def _check_same_data(job: Job, splits: Splits) -> list[str]:
    """Raise UsageError if a resumed run was started with different data; return a note if that cannot be checked."""
    then, now = job.origin.get("data") or {}, digests_of(splits) if job.origin else {}
    differing = [split for split in then if None not in (then[split], now.get(split)) and then[split] != now[split]]
    if differing:
        problem = f"--resume: the data differ from those that run {job.run.name} was started with"
        raise UsageError(f"{problem} ({', '.join(differing)})", fix="restore them, or start another run")
    if then and None in now.values():
        return ["cannot check that the data are unchanged: the workload does not list their files (Data.files)"]
    return []


def _problem(rule: Rule, job: Job, data: Splits | None) -> str:
    """Return what is wrong, with the values of settings."""
    facts = {**job.asked, **values_of(job.train, job.workers), "workload": type(job.workload).__name__}
    facts |= {"ray": ray_version(), "num_workers": job.workers.num_workers or 1}
    if data is not None:
        facts["steps"] = job.train.total_steps(len(data.train))
        facts["blocks"] = count(len(data.train.examples.sizes), "block") if data.train.is_in_blocks else ""
    return rule.problem.format_map(facts)


def _places(rule: Rule, job: Job) -> str:
    """Return which places other than flags have given a rule's settings: `` (compile from settings.toml)``."""
    places = dict[str, list[str]]()
    for name in rule.settings:
        if name in job.placed and job.placed[name].place != FLAGS:
            places.setdefault(job.placed[name].place, []).append(name)
    given = "; ".join(f"{', '.join(names)} from {place}" for place, names in places.items())
    return f" ({given})" if given else ""
