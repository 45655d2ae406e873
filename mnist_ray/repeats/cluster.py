"""The members of a job of several runs, each a whole run with all its files.

On a cluster, as many Ray tasks at a time as it holds; without one, one after another in the job's own process.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from mnist_ray.cluster.nodes import Waiting
from mnist_ray.cluster.plan import Cluster, WorkerPlan, held_at_once
from mnist_ray.cluster.remote_data import may_be_stored
from mnist_ray.data.data import Data, Split
from mnist_ray.errors import JobError, TrainingStoppedError, first_line
from mnist_ray.job.job import Job
from mnist_ray.job.session import Clock, Session, console_of
from mnist_ray.record.recorder import known_repository
from mnist_ray.repeats.train import Member, members_of
from mnist_ray.report.console import RunConsole
from mnist_ray.report.run_files import METRICS_FILE, number_of, read_numbers
from mnist_ray.repository import Repository
from mnist_ray.run.failures import cause_of, code_failures_placed, may_pass
from mnist_ray.run.fit import train_run
from mnist_ray.storage import ORIGIN_FILE, RESULT_FILE
from mnist_ray.text import count
from mnist_ray.workload.calls import data_of, splits_for

_LOOK_EVERY_S = 2.0  # at the files of the running members


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
    train_run(session, spec.plan, is_last=False)


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


def train_members(session: Session, plan: WorkerPlan, data: Data) -> None:
    """Train and test the members that are not finished. Raises a member's error, with its name.

    A member whose process or node is lost continues from its last checkpoint, --max-failures times.
    """
    members = [member for member in members_of(session.job) if not member.is_finished]
    cluster = Cluster(session.cluster.is_local, session.cluster.nodes, session.cluster.log_folder)
    spec = MemberSpec(plan, cluster, known_repository(session), session.own_unused, tuple(sys.argv))
    if session.is_here:
        for member in members:
            session.console.say("", "")
            session.console.say("run", member.label)
            train_here(member.job, spec, data, console_of(member.job))
    else:
        _train_in_tasks(session, members, spec, data)


def _train_in_tasks(session: Session, left: list[Member], spec: MemberSpec, data: Data) -> None:
    plan, workers, console = spec.plan, session.job.workers, session.console
    concurrent = len(left) if workers.autoscaling else min(len(left), held_at_once(plan, session.cluster.nodes))
    fields = [field for field in (data.train, data.validation, data.test) if field is not None]
    are_stored = all(may_be_stored(Split(field)) for field in fields)  # else, each process loads them
    spec = dataclasses.replace(spec, stored=ray.put(data) if are_stored else None)
    console.say("at a time", count(concurrent, "run"))
    task, running, failures = _task(plan), dict[ray.ObjectRef, Member](), Counter[str]()
    waiting = Waiting("a run", functools.partial(console.say, "note"))
    while left or running:
        while left and len(running) < concurrent:
            member = left.pop(0)
            running[task.remote(member.job, spec)] = member
        ended, _ = ray.wait([*running], timeout=_LOOK_EVERY_S)
        for reference in ended:
            member = running.pop(reference)
            try:
                notes = ray.get(reference)
            except RayError as error:
                failures[member.name] += 1
                reason = _reason_to_repeat(member, error, is_last=failures[member.name] > workers.max_failures)
                console.say("lost", f"{member.label}: {reason}; it continues from its last checkpoint")
                left.insert(0, member)
            else:
                _say_ended(session, member, notes)
        waiting.look(is_waiting=not any(member.job.run.exists(ORIGIN_FILE) for member in running.values()))
        console.waiting(_progress([*running.values()], session.job.train.num_epochs))


def _task(plan: WorkerPlan) -> Any:
    """Return the remote function that trains a member. With several workers, it only waits for them."""
    is_here = plan.num_workers == 1
    options = {"num_cpus": plan.cpus_per_worker, "num_gpus": int(plan.use_gpu)} if is_here else {"num_cpus": 0}
    selector = {"label_selector": dict(plan.labels)} if plan.labels else {}
    return ray.remote(max_retries=0, **options, **selector)(train_member)


def _reason_to_repeat(member: Member, error: RayError, *, is_last: bool) -> str:
    """Return why a member has failed, if a repetition may help. Raises the error in one line otherwise."""
    cause = cause_of(error)
    reason = cause.text if isinstance(cause, JobError) else first_line(cause)
    if isinstance(cause, RayError):
        reason = f"it was lost with its process or node ({type(cause).__name__})"
    if isinstance(cause, TrainingStoppedError) or not may_pass(cause):
        raise TrainingStoppedError(f"{member.label}: {reason}") from error
    if is_last:
        raise JobError(f"{member.label}: {reason}") from error
    return reason


def _say_ended(session: Session, member: Member, notes: Sequence[str]) -> None:
    workload, result = session.job.workload, member.job.run.require_json(RESULT_FILE)
    values = {metric.name: number_of(result.get(f"test_{metric.name}")) for metric in workload.all_metrics}
    seconds = number_of(result["seconds"].get("total"))
    session.console.say(member.label, f"{workload.format(values)} in the test, after {seconds:.1f} s")
    for note in notes:
        session.console.say("note", f"{member.label}: {note}")


def _progress(running: Sequence[Member], num_epochs: int) -> str:
    """Return how far the running members are, by the files that they write."""
    said = []
    for member in running:
        rows = read_numbers(member.job.run, METRICS_FILE, "epoch")
        said.append(f"{member.label}: {max((row['epoch'] for row in rows), default=0):.0f}/{num_epochs} epochs")
    return " · ".join(said)
