"""The members of a job of several runs: one per seed and fold. Imports neither torch nor Ray."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mnist_ray.job.job import Job
from mnist_ray.storage import MEMBERS_FOLDER, RESULT_FILE


@dataclass(frozen=True)
class Member:
    """One run of several; its folder is inside the job's."""

    name: str  # of its folder
    label: str  # what messages call it
    job: Job

    @property
    def is_finished(self) -> bool:
        """Whether it is tested. Raises JobError."""
        return self.job.run.read_json(RESULT_FILE) is not None


def members_of(job: Job) -> list[Member]:
    """Return the members of a job, seed by seed. Each has the weights of a run with its ``seed`` and ``fold`` alone."""
    config, members = job.train, list[Member]()
    folds = range(1, config.folds + 1) if config.folds and config.is_folded else [config.fold]
    for seed in range(config.seed, config.seed + config.num_seeds):
        for fold in folds:
            name = f"seed-{seed}" + (f"_fold-{fold}" if fold else "")
            label = f"fold {fold}" if config.num_seeds == 1 else name.replace("_", ", ").replace("-", " ")
            train = dataclasses.replace(config, seed=seed, fold=fold, num_seeds=1)
            run = job.run.inside(MEMBERS_FOLDER).inside(name)
            members.append(Member(name, label, dataclasses.replace(job, train=train, run=run, notes=())))
    return members
