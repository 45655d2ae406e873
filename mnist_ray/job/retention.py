"""Which checkpoints are kept: a run's best and its last, a one-worker trial's last, and none of an eliminated trial."""

from __future__ import annotations

from collections.abc import Set

from mnist_ray.job.find import checkpoints_of
from mnist_ray.storage import RunFolder, position_of, with_retries

NUM_KEPT = 2  # checkpoints of a run, the best by validation; the last one is kept, too, so one may be damaged


def drop_worse(run: RunFolder) -> None:
    """Delete a run's whole checkpoints except the NUM_KEPT best and the last. Raises JobError and STORAGE_ERRORS."""
    whole = [name for name, _ in checkpoints_of(run)]
    for name in set(whole).difference(whole[:NUM_KEPT], sorted(whole, key=position_of)[-1:]):
        run.inside(name).delete()


def drop_earlier(run: RunFolder, position: tuple[int, int]) -> None:
    """Delete a one-worker trial's checkpoints before an epoch and step. Raises STORAGE_ERRORS."""
    for name in run.checkpoint_names():
        if position_of(name) < position:
            run.inside(name).delete()


def drop_trials(trials: RunFolder, names: Set[str]) -> None:
    """Delete trials in a sweep's folder of ``trials``, so that its disk use does not grow. Raises STORAGE_ERRORS."""
    for name in names & {*with_retries(trials.subfolders)}:
        trials.inside(name).delete()
