"""Checks a job's settings against its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mnist_ray.data.data import Split, Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import UsageError
from mnist_ray.job import rules
from mnist_ray.job.job import Job
from mnist_ray.text import count


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
    rules.check(dataclasses.replace(job, train=with_largest), data)
    rules.check_used([job], job.given, data)
    if job.train.batch_size > num_train:
        job = job.with_values({"batch_size": num_train})
    notes += [*_notes_on_streams(job, data.train), *_notes_on_early_stop(job)]
    return dataclasses.replace(job, notes=(*job.notes, *notes))


def _check_batch_size(job: Job, num_train: int, largest: int, *, is_of_sweep: bool) -> list[str]:
    """Return a note that a batch has all examples. Raises UsageError if the user asked for more."""
    there, name = f"{num_train:,} {job.workload.nouns} to train on", "sweep" if is_of_sweep else "batch_size"
    if name in job.given:
        asked = "--sweep: batch size" if is_of_sweep else "--batch-size"
        raise UsageError(f"{asked} {largest:,} is larger than the {there}")
    return [f"batch size {num_train:,}, not {largest:,}: there are only {there}"]


def _notes_on_streams(job: Job, train: Split) -> list[str]:
    """Return a note if there are fewer blocks than streams."""
    if not train.is_in_blocks or len(train.examples.sizes) >= job.train.num_streams:
        return []
    streams = f"{count(job.train.num_streams, 'stream')} of blocks (num_streams)"
    return [f"{count(len(train.examples.sizes), 'block')} for {streams}: some are read twice; write smaller ones"]


def _notes_on_early_stop(job: Job) -> list[str]:
    """Return a note if the learning rate may not come down."""
    if job.train.early_stopping_patience is None or job.train.lr_schedule == "constant":
        return []
    said = f"the {job.train.lr_schedule} schedule spans all epochs: if training stops early, the learning rate has"
    return [f"{said} not come down; --lr-schedule constant avoids that"]


def _check_same_data(job: Job, splits: Splits) -> list[str]:
    """Raise UsageError if a resumed run was started with different data; return a note if that cannot be checked."""
    then, now = job.origin.get("data") or {}, digests_of(splits) if job.origin else {}
    differing = [split for split in then if None not in (then[split], now.get(split)) and then[split] != now[split]]
    if differing:
        raise UsageError(
            f"--resume: the data differ from those that run {job.run.name} was started with "
            f"({', '.join(differing)}); restore them, or start another run"
        )
    if then and None in now.values():
        return ["cannot check that the data are unchanged: the workload does not list their files (Data.files)"]
    return []
