"""A member of a job of many runs: a whole run with all its files, trained in segments, in any process."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.data.data import Data
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.job.job import Job
from mnist_ray.job.session import Clock, Session
from mnist_ray.many.points import Point
from mnist_ray.many.rungs import Segment
from mnist_ray.many.table import Many
from mnist_ray.provenance import Repository
from mnist_ray.report.console import RunConsole
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.fit import train_run
from mnist_ray.training.events import Event, Saved
from mnist_ray.workload.calls import data_of, splits_for

Report = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class MemberSpec:
    """What all members share."""

    many: Many
    plan: WorkerPlan
    cluster: Cluster
    repository: Repository | None  # that of the user's code
    own_unused: set[str] | None  # as in a Session
    command_line: tuple[str, ...]
    stored: ray.ObjectRef | None = None  # the workload's Data, if other processes can take them

    def session(self, job: Job, console: RunConsole, data: Data) -> Session:
        """Return the session of a member, with a clock of its own. With one worker, this process trains."""
        repository = Future[Repository | None]()
        repository.set_result(self.repository)
        number = 0 if self.plan.num_workers == 1 else job.workers.num_workers
        workers = dataclasses.replace(job.workers, num_workers=number)
        splits = splits_for(job.workload, data, job.train)
        return Session(job, workers, splits, console, Clock(), self.cluster, repository, self.own_unused)


class NotesConsole(RunConsole):
    """Passes a run's notes on, and prints nothing."""

    def __init__(self, job: Job, pass_on: Callable[[str], object]) -> None:
        super().__init__(job.workload, job.train.num_epochs, quiet=True)
        self._pass_on = pass_on

    def say(self, label: str, text: str) -> None:
        """Pass a note on."""
        if label == "note":
            self._pass_on(text)

    def result(self, label: str, text: str) -> None:
        """Print nothing."""


def train_segment(session: Session, plan: WorkerPlan, segment: Segment, report: Report) -> None:
    """Train a member from its last checkpoint to the segment's end; report each validated checkpoint's metrics.

    Raises like ``fit``.
    """

    def on_event(event: Event) -> None:
        if isinstance(event, Saved):
            report(event.metrics)

    until_epoch = math.inf if segment.is_tested else segment.until_epoch
    train_run(session, plan, until_epoch=until_epoch, is_tested=segment.is_tested, is_last=False, on_event=on_event)


def train_in_tune(tune_config: dict[str, Any], spec: MemberSpec) -> None:
    """Train a segment in a process of Ray Tune, which reuses it for the next one if a member has one worker.

    A failure that would happen again is reported. Other failures are raised, and Tune tries again.
    """
    sys.argv = [*spec.command_line]  # for the run's origin
    segment = Segment(Point(**tune_config["point"]), tune_config["until_epoch"], tune_config["is_tested"])
    notes = list[str]()  # also from other threads, in which Tune takes no reports
    try:
        with code_failures_placed(*spec.many.job.code_folders):
            job = spec.many.member(segment.point)
            console = NotesConsole(job, notes.append)
            data = data_of(job.workload) if spec.stored is None else ray.get(spec.stored)
            session = spec.session(job, console, data)
            train_segment(session, spec.plan, segment, lambda metrics: tune.report({**metrics}))
        tune.report({"notes": notes})
    except TrainingStoppedError as error:
        tune.report({"reason": str(error)})
