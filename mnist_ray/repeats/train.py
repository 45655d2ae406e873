"""``train`` on one screen: a run, or a run for each seed and fold. Imports neither torch nor Ray at the top."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from mnist_ray.data.data import Splits
from mnist_ray.job.job import Job
from mnist_ray.job.job_data import check_against_data
from mnist_ray.job.session import console_of, opened, started
from mnist_ray.record.header import say_plan, say_result, say_run
from mnist_ray.report.console import RunConsole
from mnist_ray.storage import CONFIG_FILE, MEMBERS_FOLDER, RESULT_FILE
from mnist_ray.text import count
from mnist_ray.workload.calls import data_of, splits_for

_MANY_FOLDS = 20


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


def train(job: Job) -> None:
    """Load data, start Ray, train, test, report. Of several runs, report the means and their intervals.

    If the job is interrupted and resumed, its finished runs stay as they are. Raises UsageError, JobError,
    KeyboardInterrupt with one-line texts.
    """
    if job.is_finished:
        say_result(console_of(job), job)
        return
    if job.train.is_several:
        job = dataclasses.replace(job, workers=job.workers.of_many)
    with started(job, preload="mnist_ray.repeats.cluster") as start:
        data = data_of(job.workload)
        splits = splits_for(job.workload, data, job.train)
        job = check_against_data(job, splits)
        console = console_of(job)
        with opened(start, job, splits, console, functools.partial(say_header, console, job, splits)) as session:
            from mnist_ray.record.recorder import logs_named, write_settings  # torch was loaded while Ray started
            from mnist_ray.repeats import summary
            from mnist_ray.repeats.cluster import train_members
            from mnist_ray.run import fit

            plan = fit.plan(session)
            if job.output.dry_run:
                say_plan(session, plan)
                fit.check_nodes_for(session, plan)
            elif not job.train.is_several:
                fit.train_run(session, plan)
            else:
                say_plan(session, plan)
                write_settings(session, plan, CONFIG_FILE, job.values)
                job.run.check_subfolders(MEMBERS_FOLDER)
                with logs_named(session):
                    train_members(session, plan, data)
                summary.write(session, splits.test)


def say_header(console: RunConsole, job: Job, splits: Splits) -> None:
    """Print a job's header; of several runs, also how many there are, and for what."""
    say_run(console, job, splits)
    config = job.train
    if not config.is_several:
        return
    parts = [f"{config.num_seeds} seeds"] * (config.num_seeds > 1) + [f"{config.folds} folds"] * config.is_folded
    console.say("runs", f"{len(members_of(job)):,}, for {' and '.join(parts)}")
    if config.is_folded and config.folds is not None and config.folds > _MANY_FOLDS:
        tested = count(len(splits.test) // config.folds, job.workload.noun)
        said = f"{config.folds} folds train a whole run each, to test it on {tested}"
        console.say("note", f"{said}; 5 to 10 folds are usual")
