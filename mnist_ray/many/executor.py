"""Trains the members of a job of many runs: on Ray Tune or, without Ray, one after another in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from mnist_ray import extras
from mnist_ray.checkpoints.find import drop_worse
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.cluster.nodes import Waiting, temporary_folder
from mnist_ray.cluster.plan import Cluster, WorkerPlan, held_at_once
from mnist_ray.data.data import Data
from mnist_ray.errors import JobError, TrainingStoppedError
from mnist_ray.job.job import Job
from mnist_ray.job.session import Clock, Session, console_of
from mnist_ray.many.points import Point
from mnist_ray.many.rungs import Segment, climb, find_best, rungs_of, score_at, segments
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.provenance import Repository
from mnist_ray.report.console import RunConsole
from mnist_ray.report.run_files import DONE, ENDED, FAILED, LOST, RUNNING, STOPPED, WAITING
from mnist_ray.run.failures import code_failures_placed
from mnist_ray.run.fit import train_run
from mnist_ray.schema import MEMBERS_FOLDER
from mnist_ray.storage import STORAGE_ERRORS, in_one_line
from mnist_ray.text import count, masked
from mnist_ray.training.events import Event, Saved
from mnist_ray.workload.calls import data_of, splits_for

_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle Ctrl-C: a job resumes from members.csv and their checkpoints
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune's CSV, JSON and TensorBoard files of each trial
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's new output prints a box with its configuration even with verbose=0
}
Report = Callable[[Mapping[str, Any]], Any]
Show = Callable[[Table, Member | None], None]  # gets the changed table, and the member whose segment has ended, if any
Say = Callable[[str, str], None]


@dataclass(frozen=True)
class MemberSpec:
    """What all members share."""

    many: Many
    plan: WorkerPlan
    cluster: Cluster
    repository: Repository | None  # that of the user's code
    command_line: tuple[str, ...]
    stored: ray.ObjectRef | None = None  # the workload's Data, if other processes can take them

    def session(self, job: Job, console: RunConsole, data: Data) -> Session:
        """Return the session of a member, with a clock of its own. With one worker, this process trains."""
        repository = Future[Repository | None]()
        repository.set_result(self.repository)
        number = 0 if self.plan.num_workers == 1 else job.workers.num_workers
        workers = dataclasses.replace(job.workers, num_workers=number)
        splits = splits_for(job.workload, data, job.train)
        return Session(job, workers, splits, console, Clock(), self.cluster, repository)


class QuietConsole(RunConsole):
    """Prints nothing of a member: the job prints a line for it."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.workload, job.train.num_epochs, quiet=True)

    def result(self, label: str, text: str) -> None:
        """Print nothing."""


def at_a_time(many: Many, plan: WorkerPlan, cluster: Cluster) -> int:
    """Return how many members train at once: as many as the cluster holds, at most --max-concurrent-trials.

    With ``--autoscaling``, --max-concurrent-trials may be more than the cluster holds: waiting members make it grow.
    """
    if plan.num_workers == 0:
        return 1
    held, asked = held_at_once(plan, cluster.nodes), many.config.max_concurrent_trials
    if asked is not None:
        held = asked if many.job.workers.autoscaling else min(held, asked)
    return min(held, many.config.num_trials * len(many.points(())))


def train_members(spec: MemberSpec, data: Data, concurrent: int, show: Show, say: Say) -> Table:
    """Train the members that are not finished; return the table of all.

    Raises JobError if a run of several seeds or folds failed, or every trial of a sweep.
    """
    many = spec.many
    table = many.table()
    keeper = Keeper(many, table, show, say)
    if spec.plan.num_workers == 0:
        _train_here(keeper, spec, data)
    elif keeper.next_segment() is not None:
        with in_one_line("the storage has failed"):
            _train_on_tune(keeper, spec, concurrent)
    if keeper.failure is not None:
        raise keeper.failure
    if many.is_sweep and find_best(table) is None:
        reasons = [member.reason for member in table.members if member.reason]
        has_lost = any(member.state == LOST for member in table.members)  # a resumed sweep tries them again
        error = JobError if has_lost else TrainingStoppedError
        raise error(f"every trial failed; the first one: {reasons[0]}")
    return table


def _train_here(keeper: Keeper, spec: MemberSpec, data: Data) -> None:
    """Train segment after segment in this process, until there are no more."""
    while (segment := keeper.next_segment()) is not None:
        job = spec.many.member(segment.point)
        console = QuietConsole(job) if spec.many.is_sweep else console_of(job)
        keeper.started(segment.point)
        reason = ""
        try:
            session = spec.session(job, console, data)
            train_segment(session, spec.plan, segment, functools.partial(keeper.reported, segment.point))
        except TrainingStoppedError as error:
            reason = str(error)
        keeper.ended(segment, reason)


def train_in_tune(tune_config: dict[str, Any], spec: MemberSpec) -> None:
    """Train a segment in a process of Ray Tune, which reuses it for the next one if a member has one worker.

    A failure that would happen again is reported. Other failures are raised, and Tune tries again.
    """
    sys.argv = [*spec.command_line]  # for the run's origin
    segment = _segment(tune_config)
    reason = ""
    try:
        with code_failures_placed(*spec.many.job.code_folders):
            job = spec.many.member(segment.point)
            data = data_of(job.workload) if spec.stored is None else ray.get(spec.stored)
            session = spec.session(job, console_of(job), data)
            train_segment(session, spec.plan, segment, lambda metrics: tune.report({**metrics}))
    except TrainingStoppedError as error:
        reason = str(error)
    tune.report({"reason": reason})


def train_segment(session: Session, plan: WorkerPlan, segment: Segment, report: Report) -> None:
    """Train a member from its last checkpoint to the segment's end; report each validated checkpoint's metrics.

    Raises like ``fit``.
    """

    def on_event(event: Event) -> None:
        if isinstance(event, Saved):
            report(event.metrics)

    until_epoch = math.inf if segment.is_tested else segment.until_epoch
    train_run(session, plan, until_epoch=until_epoch, is_tested=segment.is_tested, is_last=False, on_event=on_event)


def _train_on_tune(keeper: Keeper, spec: MemberSpec, concurrent: int) -> None:
    """Let Tune train segments until there are no more."""
    os.environ.update(_SETTINGS)
    workers = spec.many.job.workers
    resources = {"CPU": spec.plan.cpus_per_worker, **({"GPU": 1} if spec.plan.use_gpu else {})}
    if spec.plan.num_workers > 1:  # its process only waits for its workers, but Tune has to reserve something
        resources = {"memory": 2**20}
    sweeps = extras.load("sweeps", plain=workers.plain_ray)
    frugally = sweeps.frugal() if sweeps else contextlib.nullcontext()
    with temporary_folder() as folder:  # Tune's own files are never read
        tuner = tune.Tuner(
            tune.with_resources(functools.partial(train_in_tune, spec=spec), tune.PlacementGroupFactory([resources])),
            tune_config=tune.TuneConfig(
                search_alg=_SegmentSearcher(keeper, concurrent),
                num_samples=-1,  # until no segments are left
                reuse_actors=spec.plan.num_workers == 1 and not spec.plan.use_gpu,  # an error may leave CUDA unusable
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder,
                callbacks=[_Watcher(keeper, workers.max_failures)],
                progress_reporter=tune.CLIReporter(),  # in a notebook, Tune's default would clear the cell's output
                failure_config=tune.FailureConfig(max_failures=workers.max_failures),
                verbose=0,
            ),
        )
        try:
            with frugally:
                tuner.fit()
        except tune.TuneError as error:  # the text is a traceback
            known = keeper.failure or error.__context__
            said = f"Ray Tune failed: {str(error).strip().splitlines()[-1]}"
            raise (known if isinstance(known, JobError) else JobError(said)) from error


class _SegmentSearcher(Searcher):
    """Gives Tune the next segment as soon as fewer than ``concurrent`` run. To Tune, each segment is a trial."""

    def __init__(self, keeper: Keeper, concurrent: int) -> None:
        super().__init__()
        self._keeper, self._concurrent = keeper, concurrent
        self._running: dict[str, Point] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the configuration for ``train_in_tune``; None if that has to wait for results of running segments."""
        running = self._running.values()
        if len(running) == self._concurrent:
            return None
        segment = self._keeper.next_segment(running)
        if segment is None:
            return None if running else Searcher.FINISHED
        self._running[trial_id] = segment.point
        return dataclasses.asdict(segment)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that a segment has ended."""
        self._running.pop(trial_id, None)  # Tune may report it again for a trial that could not be stopped

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: Tune's own restore is never used."""


class _Watcher(tune.Callback):
    """Passes on what Tune tells of its trials, each of which is a segment."""

    def __init__(self, keeper: Keeper, max_failures: int) -> None:
        self._keeper, self._max_failures = keeper, max_failures
        self._running = set[str]()  # Tune's names of the segments that are running

    def on_step_begin(self, **info: Any) -> None:
        if self._keeper.failure is not None:
            raise self._keeper.failure
        self._keeper.waiting.look(is_waiting=not self._running)

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        self._running.add(trial.trial_id)
        self._keeper.started(_segment(trial.config).point)

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self._keeper.reported(_segment(trial.config).point, result)

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        self._keeper.ended(_segment(trial.config), (trial.last_result or {}).get("reason", ""))

    def on_trial_recover(self, trial: Trial, **info: Any) -> None:
        self._keeper.lost(_segment(trial.config).point, _error_line(trial), is_final=False)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        is_final = trial.num_failures > self._max_failures  # else, the process has died as Tune was resetting it
        self._keeper.lost(_segment(trial.config).point, _error_line(trial), is_final=is_final)


def _segment(tune_config: dict[str, Any]) -> Segment:
    return Segment(**{**tune_config, "point": Point(**tune_config["point"])})


def _error_line(trial: Trial) -> str:
    """Return the last line of a failed trial's error text, without secrets: the exception and its message."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    last_line = text.strip().rpartition("\n")[2].strip()
    return masked(re.sub(r"^([a-z_]\w*\.)+", "", last_line)) or "it gave no reason"


class Keeper:
    """Decides what is trained next, and keeps the table, members.csv and the checkpoints on disk up to date."""

    def __init__(self, many: Many, table: Table, show: Show, say: Say) -> None:
        self.say, self.waiting = say, Waiting("a run", functools.partial(say, "note"))
        self.failure: JobError | None = None  # of the storage, or of a run; Tune would hide it, and repeat the trial
        self._many, self._table, self._show = many, table, show
        for member in table.members:
            if member.state in (LOST, RUNNING):  # in an interrupted job
                member.state = self._without_process(member)
        self._num_rungs = len(climb(many, table))  # that have begun

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle nothing: Tune pickles its callbacks and its searcher for its own restore, which is never used."""
        return object, ()

    def next_segment(self, running: Collection[Point] = ()) -> Segment | None:
        """Return what to train next beside the ``running`` points; None if there is nothing, or only later."""
        if self.failure is not None:
            return None
        left = segments(self._many, self._table)
        return next((segment for segment in left if segment.point not in running), None)

    def started(self, point: Point) -> None:
        """Record that a segment starts."""
        self._changed(self._table.start(point))

    def reported(self, point: Point, told: Mapping[str, Any]) -> None:
        """Record the metrics of a checkpoint."""
        if "epochs" in told:
            member = self._table.by_point[point]
            member.is_over = CheckpointMetrics.of(told).is_over
            self._table.report(member, told)
            self._changed(member)

    def ended(self, segment: Segment, reason: str = "") -> None:
        """Record the end of a segment, and of its member if that was its last one or there is a ``reason``."""
        member = self._table.by_point[segment.point]
        member.state = DONE if segment.is_tested or member.is_over else WAITING
        if not reason and math.isnan(score_at(self._table, [segment.point], segment.until_epoch)):
            reason = "a callback has stopped the training" if member.state == WAITING else ""
        if reason:
            member.state, member.reason = FAILED, reason
        self._changed(member, has_ended=True)
        self._go_on(member, TrainingStoppedError)

    def lost(self, point: Point, reason: str, *, is_final: bool) -> None:
        """Record that the process of a member has died. If none had started, the member may have no row yet."""
        member = self._table.start(point)
        member.state = self._without_process(member)
        if is_final and member.state == WAITING:
            member.state, member.reason = LOST, reason
        elif member.state == WAITING:
            self.say("lost", f"{self._many.label_of(member)}: {reason}; it continues from its last checkpoint")
        self._changed(member, has_ended=member.state != WAITING)
        self._go_on(member, JobError)

    def _without_process(self, member: Member) -> str:
        """Return the state of a member whose process has died: done if only its end was not recorded, else waiting."""
        num_epochs = self._many.job.train.num_epochs
        return DONE if self._many.is_sweep and max(member.reports, default=0.0) >= num_epochs else WAITING

    def _go_on(self, member: Member, error: type[JobError]) -> None:
        """Begin a rung if a member's end allows that; end the job if the member was a seed or fold that failed."""
        self._begin_rungs()
        if member.state in (FAILED, LOST) and not self._many.is_sweep:
            self.failure = error(f"{self._many.label_of(member)}: {member.reason}")

    def _begin_rungs(self) -> None:
        """Report a rung that begins now, and stop the members that are not on it."""
        rungs, epochs = climb(self._many, self._table), rungs_of(self._many)
        if len(rungs) == self._num_rungs or not rungs[-1]:
            return
        self._num_rungs = len(rungs)
        going = f"{count(len(rungs[-1]), 'trial')} {'go' if len(rungs[-1]) > 1 else 'goes'} on"
        self.say("rungs", f"rung {len(rungs) - 1} of {len(epochs) - 1}: {going} to epoch {epochs[len(rungs) - 1]:g}")
        for member in self._table.members:
            if member.state == WAITING and member.point.configuration not in rungs[-1]:
                member.state = STOPPED
                self._changed(member)

    def _changed(self, member: Member, *, has_ended: bool = False) -> None:
        """Write and show the table after a change of a member; of a trial that is over, keep one checkpoint.

        The storage's first failure ends the job later: Tune would hide it.
        """
        try:
            with in_one_line("the storage has failed"):
                if self._many.is_sweep and member.state in ENDED:
                    of_member = self._many.job.run.inside(MEMBERS_FOLDER).inside(member.point.name)
                    drop_worse(of_member, 1, keeps_last=False)
                self._table.write(self._many.job.run)
        except JobError as error:
            self.failure = self.failure or error
            if not isinstance(error.__cause__, STORAGE_ERRORS):  # of another thread, which ends the job
                raise
        self._show(self._table, member if has_ended else None)
