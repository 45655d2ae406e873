"""The sweep on Ray Tune: runs the segments of trials that the search and the race ask for."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from mnist_ray import extras
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.cluster.nodes import Waiting
from mnist_ray.cluster.plan import Cluster, WorkerPlan, held_at_once
from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, TrainingStoppedError
from mnist_ray.job.find import drop_trials
from mnist_ray.storage import STORAGE_ERRORS, TRIALS_FILE, TRIALS_FOLDER, in_one_line
from mnist_ray.sweep.halving import Segment, climb, rungs_of, segments
from mnist_ray.sweep.proposals import Candidates
from mnist_ray.sweep.ranking import find_best, may_be_tested, score_at
from mnist_ray.sweep.space import Point
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.sweep.trials import DONE, ENDED, FAILED, LOST, RUNNING, STOPPED, WAITING, Sweep, TrialRecord, TrialTable
from mnist_ray.text import count, masked

_TUNE_FOLDER = "tune"
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle Ctrl-C: a sweep resumes from sweep.csv and the trials' checkpoints
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune's CSV, JSON and TensorBoard files of each trial
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's new output prints a box with its configuration even with verbose=0
}
OnChange = Callable[[TrialTable, TrialRecord | None], None]  # gets the changed table, and the trial that ended, if any


def trials_at_a_time(sweep: SweepConfig, plan: WorkerPlan, cluster: Cluster, *, autoscaling: bool) -> int:
    """Return how many trials run at once: as many as the cluster can hold, but at most --max-concurrent-trials.

    With ``autoscaling`` the cluster's size is no limit: waiting trials make it start nodes.
    """
    held = held_at_once(plan, cluster.nodes)
    asked = sweep.max_concurrent_trials or held
    return min(asked if autoscaling else min(held, asked), sweep.num_trials)


def run_sweep(
    sweep: Sweep, spec: TrialSpec, concurrent: int, on_change: OnChange, say: Callable[[str, str], None]
) -> TrialTable:
    """Run a sweep's unfinished trials; return the table of all its trials. Raises JobError if every trial failed."""
    os.environ.update(_SETTINGS)
    config, table = sweep.config, sweep.table()
    deadline = time.monotonic() + (config.time_budget_s or math.inf)
    watcher = _Watcher(sweep, table, on_change, say)
    _run_segments(watcher, spec, concurrent, deadline)
    if watcher.failure is None and find_best(table) is not None:
        watcher.end()
    if watcher.failure is not None:
        raise watcher.failure
    if find_best(table) is None:
        reasons = [record.reason for record in table.by_point.values() if record.reason]
        if not reasons:
            raise JobError(f"no trial was validated within --time-budget-s {config.time_budget_s:g}; allow more time")
        failed = f"every trial failed; the first one: {reasons[0]}"
        raise (JobError if table.count(LOST, RUNNING, WAITING) else TrainingStoppedError)(failed)  # what is left
    with in_one_line("the storage has failed"):
        _drop_checkpoints(sweep, table, num_confirmed=0)
    return table


def _run_segments(watcher: _Watcher, spec: TrialSpec, concurrent: int, deadline: float) -> None:
    """Let Tune run the segments until there are no more, or until the deadline."""
    run, seconds = watcher.sweep.job.run, deadline - time.monotonic()
    if seconds <= 0 or next(watcher.segments(), None) is None:
        return
    run.inside(_TUNE_FOLDER).delete()  # an interrupted sweep has left it; it is never read
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(run_trial, spec=spec), _reserved(spec.plan)),
        tune_config=tune.TuneConfig(
            search_alg=_SegmentSearcher(watcher.segments, concurrent),
            num_samples=-1,  # until no segments are left
            time_budget_s=None if math.isinf(seconds) else seconds,
            reuse_actors=spec.plan.num_workers == 1 and not spec.plan.use_gpu,  # an error may leave CUDA unusable
        ),
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=run.uri,
            callbacks=[watcher],
            progress_reporter=tune.CLIReporter(),  # in a notebook, Tune's default would clear the cell's output
            failure_config=tune.FailureConfig(max_failures=watcher.sweep.job.workers.max_failures),
            verbose=0,
        ),
    )
    frugally: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if extras.is_on("sweeps", plain=watcher.sweep.job.workers.plain_ray):
        from mnist_ray.extras import sweeps

        frugally = sweeps.frugal()
    try:
        with in_one_line("the storage has failed"), frugally:
            tuner.fit()
    except tune.TuneError as error:  # the text is a traceback
        known = watcher.failure or error.__context__
        said = f"Ray Tune failed: {str(error).strip().splitlines()[-1]}"
        raise (known if isinstance(known, JobError) else JobError(said)) from error
    with watcher.failure_noted():
        run.inside(_TUNE_FOLDER).delete()


def _reserved(plan: WorkerPlan) -> tune.PlacementGroupFactory:
    """Return what Tune reserves for a trial."""
    if plan.num_workers > 1:  # the trial only waits for its workers, but Tune has to reserve something
        return tune.PlacementGroupFactory([{"memory": 2**20}])
    resources = {"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})}
    labels = {"bundle_label_selector": [dict(plan.labels)]} if plan.labels else {}
    return tune.PlacementGroupFactory([resources], **labels)


class _SegmentSearcher(Searcher):
    """Gives Tune the next segment as soon as fewer than ``concurrent`` run. To Tune, each segment is a trial."""

    def __init__(self, next_segments: Callable[[], Iterator[Segment]], concurrent: int) -> None:
        super().__init__()
        self._next_segments, self._concurrent = next_segments, concurrent
        self._running: dict[str, Point] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the configuration for ``run_trial``; None if that has to wait for the results of running segments."""
        running = self._running.values()
        if len(running) == self._concurrent:
            return None
        segment = next((segment for segment in self._next_segments() if segment.point not in running), None)
        if segment is None:
            return None if running else Searcher.FINISHED
        self._running[trial_id] = segment.point
        return {"values": segment.point.values, "seed": segment.point.seed, "until_epoch": segment.until_epoch}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that a segment has ended."""
        self._running.pop(trial_id, None)  # Tune may report it again for a trial that could not be stopped

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: Tune's own restore is never used."""


class _Watcher(tune.Callback):
    """Decides what is trained next, and keeps the table, sweep.csv and the checkpoints on disk up to date."""

    def __init__(self, sweep: Sweep, table: TrialTable, on_change: OnChange, say: Callable[[str, str], None]) -> None:
        self.sweep, self._table, self._on_change, self._say = sweep, table, on_change, say
        self._candidates = Candidates(sweep, table)
        for record in table.by_point.values():
            if record.state in (LOST, RUNNING):  # in an interrupted sweep
                record.state = self._without_process(record)
        self._waiting = Waiting("a trial", functools.partial(say, "note"))
        self._num_rungs = len(climb(sweep, table, self._candidates))  # that have begun
        self.failure: JobError | None = None  # of the storage; Tune would hide it, and repeat the trial
        self._running = set[str]()  # Tune's names of the segments that are running

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle nothing: Tune pickles callbacks for its own restore, which is never used."""
        return tune.Callback, ()

    def segments(self) -> Iterator[Segment]:
        """Yield what can be trained now, or is being trained; a point is only proposed if the caller takes it."""
        if self.failure is not None:
            return
        known = functools.partial(segments, self.sweep, self._table, self._candidates)
        yield from known()
        if self._candidates.num_unknown:
            yield from self._proposed()
            self._begin_rungs()  # nothing is left to propose: the first rung may be complete
            yield from known()

    def _proposed(self) -> Iterator[Segment]:
        """Yield the first segments of new points."""
        epoch = rungs_of(self.sweep)[0]
        while point := self._candidates.propose(lambda point: score_at(self._table, point, epoch)):
            yield Segment(point, epoch)

    def on_step_begin(self, **info: Any) -> None:
        self._waiting.look(is_waiting=not self._running)

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        self._table.start(self._point(trial))
        self._running.add(trial.trial_id)
        self._changed()

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        record, metrics = self._table.by_point[self._point(trial)], CheckpointMetrics.of(result)
        self._table.update(record, result)
        if metrics.is_validated:
            record.add_report(metrics.epochs, record.val_monitor)
        self._changed()

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        record = self._table.by_point[self._point(trial)]
        if record.reason:
            record.state = FAILED
        elif CheckpointMetrics.of(trial.last_result or {}).is_over:
            record.state = DONE
        else:
            record.state = WAITING
        self._segment_ended(trial, record)
        with self.failure_noted():
            _drop_checkpoints(self.sweep, self._table, self.sweep.config.num_confirmed)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        # Tune does not retry a process that dies as it is reset. If none has started, the trial has no record yet.
        record = self._table.start(self._point(trial))
        record.state = self._without_process(record)
        if record.state == WAITING and trial.num_failures > self.sweep.job.workers.max_failures:
            record.state, record.reason = LOST, error_line_of(trial)
        self._segment_ended(trial, *([] if record.state == WAITING else [record]))

    def _without_process(self, record: TrialRecord) -> str:
        """Return the state of a trial whose process has died: done if it had reported its last epoch, else waiting."""
        has_ended = bool(record.reported) and record.reported[-1][0] >= self.sweep.job.train.num_epochs
        return DONE if has_ended else WAITING

    def _segment_ended(self, trial: Trial, *ended: TrialRecord) -> None:
        """Record the end of a segment, and of its trial if it has ``ended``."""
        self._running.discard(trial.trial_id)
        self._changed(*ended)
        self._begin_rungs()

    def end(self) -> None:
        """Stop the trials that were cut off when time ran out, and those of the race that did not begin."""
        for segment in segments(self.sweep, self._table, self._candidates):
            if segment.point.seed != self.sweep.job.train.seed:
                self._table.start(segment.point)
        self._stop([record for record in self._table.by_point.values() if record.state in (RUNNING, WAITING)])

    def _begin_rungs(self) -> None:
        """Report the rungs that begin now, and stop the trials that are not on them."""
        rungs, epochs = climb(self.sweep, self._table, self._candidates), rungs_of(self.sweep)
        for number in range(self._num_rungs, len(rungs)):
            before, rung = rungs[number - 1], rungs[number]
            if rung:
                going = f"{count(len(rung), 'trial')} {'go' if len(rung) > 1 else 'goes'} on"
                self._say("rungs", f"rung {number} of {len(epochs) - 1}: {going} to epoch {epochs[number]:g}")
                left = [self._table.by_point[point] for point in before if point not in rung]
                self._stop([record for record in left if record.state == WAITING])  # the others have failed or ended
        self._num_rungs = len(rungs)

    def _stop(self, records: list[TrialRecord]) -> None:
        for record in records:
            record.state = STOPPED
        self._changed(*records)

    def _point(self, trial: Trial) -> Point:
        return self.sweep.space.point(trial.config["values"], trial.config["seed"])

    @contextlib.contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Keep the storage's first failure, to end the search with it."""
        try:
            with in_one_line("the storage has failed"):
                yield
        except JobError as error:
            self.failure = self.failure or error
            if not isinstance(error.__cause__, STORAGE_ERRORS):  # of another thread, which ends the job
                raise

    def _changed(self, *ended: TrialRecord) -> None:
        with self.failure_noted():
            self.sweep.job.run.write_text(TRIALS_FILE, self._table.to_csv())
        for record in ended or (None,):
            self._on_change(self._table, record)


def _drop_checkpoints(sweep: Sweep, table: TrialTable, num_confirmed: int) -> None:
    """Delete the checkpoints of finished trials, except those that may be tested; see ``finalists``."""
    kept = may_be_tested(table, num_confirmed, sweep.job.train.seed)
    ended = [record.point for record in table.by_point.values() if record.state in ENDED]
    names = {point.name for point in ended if point not in kept}
    drop_trials(sweep.job.run.inside(TRIALS_FOLDER), names)


def error_line_of(trial: Trial) -> str:
    """Return the last line of a failed trial's error text, without secrets: the exception and its message."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    last_line = text.strip().rpartition("\n")[2].strip()
    return masked(re.sub(r"^([a-z_]\w*\.)+", "", last_line)) or "it gave no reason"
