"""One member of a job of several runs, in a Ray task or in the job's own process: a whole run, with all its files."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import Future
from dataclasses import dataclass

import ray

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.data.data import Data
from mnist_ray.job.clock import Clock
from mnist_ray.job.job import Job
from mnist_ray.job.session import Session
from mnist_ray.record.recorder import recorded
from mnist_ray.report.console import RunConsole
from mnist_ray.repository import Repository
from mnist_ray.run.evaluate import evaluate_fitted
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.fit import fit
from mnist_ray.run.in_process import fit_here
from mnist_ray.workload.calls import data_of, splits_for


@dataclass(frozen=True)
class MemberSpec:
    """What all members share."""

    plan: WorkerPlan
    cluster: Cluster
    repository: Repository | None  # that of the user's code
    own_unused: set[str] | None  # as in a Session
    command_line: tuple[str, ...]
    stored: ray.ObjectRef | None = None  # the workload's Data, if other processes can take them


def train_member(job: Job, spec: MemberSpec) -> list[str]:
    """Train and test one member in a Ray task, from its last checkpoint; return its notes. Raises like ``fit``.

    A member with one worker trains in this process, with the weights that Ray Train's worker would have.
    """
    sys.argv = [*spec.command_line]  # for the run's origin
    console = NotesConsole(job)
    if spec.plan.num_workers == 1:
        job = dataclasses.replace(job, workers=dataclasses.replace(job.workers, num_workers=0))
    with code_failures_placed(*job.code_folders):
        train_here(job, spec, data_of(job.workload) if spec.stored is None else ray.get(spec.stored), console)
    return console.notes


def train_here(job: Job, spec: MemberSpec, data: Data, console: RunConsole) -> None:
    """Train and test one member from this process, from its last checkpoint. Raises like ``train``."""
    repository = Future[Repository | None]()
    repository.set_result(spec.repository)
    splits = splits_for(job.workload, data, job.train)
    session = Session(job, job.workers, splits, console, Clock(), spec.cluster, repository, spec.own_unused)
    with recorded(session, spec.plan) as record:
        fitted = (fit_here if session.is_here else fit)(session, spec.plan, record.on_event)
        evaluate_fitted(session, spec.plan, record, fitted, is_last=False)


class NotesConsole(RunConsole):
    """Keeps a run's notes for the driver, and prints nothing."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.workload, job.train.num_epochs, quiet=True)
        self.notes: list[str] = []

    def say(self, label: str, text: str) -> None:
        """Keep a note."""
        if label == "note":
            self.notes.append(text)

    def result(self, label: str, text: str) -> None:
        """Print nothing."""
