"""A sweep's settings, space and data, settled before it starts.

Nothing here imports torch or Ray, so that a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass

from mnist_ray import settings
from mnist_ray.config import SweepConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError, command
from mnist_ray.run import session
from mnist_ray.run.job import Given, Job, read_job
from mnist_ray.settings import Choice
from mnist_ray.storage import SWEEP_FILE, TRIALS_FILE, DamagedFileError
from mnist_ray.sweep.space import Space, propose, space_of
from mnist_ray.sweep.trials import TrialTable
from mnist_ray.workload.data import Splits

BEST_FILE, DEFAULT_FOLDER = "best.json", "default"


@dataclass(frozen=True)
class Sweep:
    """All settings of a sweep."""

    config: SweepConfig
    space: Space
    job: Job  # of all trials and the trainings at the end

    @property
    def workers(self) -> WorkerConfig:
        """The workers of a trial; by default one with one core, as more trials at a time are faster than threads."""
        asked = self.job.workers
        return dataclasses.replace(
            asked, num_workers=asked.num_workers or 1, cpus_per_worker=asked.cpus_per_worker or 1
        )

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes to try; of a range, its ends. Empty if the batch size is not searched."""
        space = self.space.spaces.get("batch_size")
        if space is None:
            return []
        return list(space.options) if isinstance(space, Choice) else [int(space.low), int(space.high)]

    def table(self) -> TrialTable:
        """Return the trials in its folder. Raises DamagedFileError."""
        return TrialTable(type(self.job.workload), self.space).read(self.job.run)


def read_sweep(given: Given | None = None) -> Sweep:
    """Read the command line of ``jobs/tune.py``, or ``given`` in its place.

    Raises UsageError, and JobError if a sweep's trials are damaged.
    """
    job = read_job(
        given,
        "tune",
        "Search the settings that have a search space with Ray Tune, train the best and evaluate it once on the test "
        "set. A trial has one worker with one CPU, unless --num-workers and --cpus-per-worker say otherwise.",
        SWEEP_FILE,
        more_settings=[SweepConfig],
    )
    config = settings.build(SweepConfig, job.asked)
    space = space_of(type(job.workload), job.asked, fixed=job.given)
    config = dataclasses.replace(config, sweep=config.sweep or space.texts())
    if config.search == "grid":
        propose(space, config, job.train.seed)  # raises if there are too few trials
    if config.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UsageError("--search optuna needs Optuna: pip install -e '.[optuna]'")
    sweep = Sweep(config, space, job)
    _check_trials(sweep)
    return sweep


def _check_trials(sweep: Sweep) -> None:
    """Raise JobError if a resumed sweep has lost its trials.

    If it has chosen its best configuration, the trials are not run again: they might choose another.
    """
    run = sweep.job.run
    has_chosen, remedy = run.exists(BEST_FILE), "remove it, and the trials are run again"
    if has_chosen:
        best = run.inside(BEST_FILE).uri
        remedy = f"train the chosen settings with {command('train')} --config {best}, or start another sweep"
    try:
        is_lost = sweep.table().best is None
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {remedy}") from error
    if has_chosen and is_lost:
        raise JobError(f"{run.inside(TRIALS_FILE).uri} has lost its trials; {remedy}")


def load_data(sweep: Sweep) -> tuple[Sweep, Splits]:
    """Return the sweep, completed by the data's metadata, and its data. Raises UsageError and JobError."""
    job, data = session.load_data(sweep.job, sweep.batch_sizes)
    for field in dataclasses.fields(job.workload.settings):
        if field.name in sweep.space.spaces and field.metadata.get("decides_data"):
            raise UsageError(f"--sweep {field.name}: load_data depends on it, and all trials have the same data")
    if len(data.validation) == 0:
        monitor = job.workload.monitor.name
        raise UsageError(f"--validation-size 0: a sweep chooses by validation {monitor}; hold some examples out")
    return dataclasses.replace(sweep, job=job), data
