"""The sweep on Ray Tune: proposes points, runs trials and stops the bad ones early."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch  # importable without Optuna, which is an extra

from mnist_ray.cluster.plan import Cluster, WorkerPlan, suitable
from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, masked
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder, with_retries
from mnist_ray.sweep.space import Point, propose
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.sweep.trials import DONE, FAILED, LOST, RUNNING, STOPPED, Sweep, TrialRecord, TrialTable

TRIALS_FOLDER, _TUNE_FOLDER = "trials", "tune"
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
    rooms = [node.room(plan.cpus_per_worker, plan.use_gpu) for node in suitable(cluster.nodes, plan.labels)]
    held = max(1, sum(rooms) // plan.num_workers)
    asked = sweep.max_concurrent_trials or held
    return min(asked if autoscaling else min(held, asked), sweep.num_trials)


def run_sweep(sweep: Sweep, spec: TrialSpec, concurrent: int, on_change: OnChange) -> TrialTable:
    """Run a sweep's unfinished trials; return the table of all its trials. Raises JobError if every trial failed."""
    os.environ.update(_SETTINGS)
    config, table, seed = sweep.config, sweep.table(), sweep.job.train.seed
    watcher = _Watcher(sweep, table, on_change)
    run_trials = functools.partial(
        _run_trials, spec, watcher, concurrent, time.monotonic() + (config.time_budget_s or math.inf)
    )
    points = None if config.search == "optuna" else propose(sweep.space, config, seed)
    tried, best, with_default = sweep.planned
    table.num_planned = max(len(table.by_point), tried + 2 * (best + with_default))
    run_trials(points, _scheduler(sweep, table))
    confirmations = table.confirmations(config, seed)
    table.num_planned = len(table.by_point.keys() | set(confirmations))
    run_trials(confirmations, FIFOScheduler())
    if table.best is None:
        reasons = [record.reason for record in table.by_point.values() if record.reason]
        again = f"; to try lost trials again: {sweep.job.resume_with}" if table.count(LOST) else ""
        raise JobError(f"every trial failed; the first one: {reasons[0] if reasons else 'the time was up'}{again}")
    watcher.end()
    _drop_checkpoints(sweep.job.run, table, kept={max(table.best.records, key=table.worth).point})
    return table


def _run_trials(
    spec: TrialSpec,
    watcher: _Watcher,
    concurrent: int,
    deadline: float,
    points: list[Point] | None,
    scheduler: TrialScheduler,
) -> None:
    """Let Tune run the unfinished trials of ``points`` (None: of Optuna's points) until the deadline."""
    sweep, run, seconds = watcher.sweep, watcher.sweep.job.run, deadline - time.monotonic()
    if points is None:
        algorithm, num_trials = _optuna(sweep, watcher.table, concurrent)
    else:
        points = watcher.table.unfinished(points)
        presets = [{**point.values, "seed": point.seed} for point in points]
        algorithm = BasicVariantGenerator(points_to_evaluate=presets, max_concurrent=concurrent)
        num_trials = len(points)
    if num_trials <= 0 or seconds <= 0:
        return
    if spec.plan.num_workers > 1:  # a trial only waits for its workers, but Tune has to reserve something
        group = tune.PlacementGroupFactory([{"memory": 2**20}])
    else:
        resources = {"CPU": spec.plan.cpus_per_worker, **({"GPU": 1} if spec.plan.use_gpu else {})}
        group = tune.PlacementGroupFactory([resources], bundle_label_selector=[dict(spec.plan.labels)])
    run.inside(_TUNE_FOLDER).delete()  # an interrupted sweep has left it; it is never read
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(run_trial, spec=spec), group),
        # The search fills these in; the seed stays if the search proposes none.
        param_space={**dict.fromkeys(sweep.space.spaces), "seed": sweep.job.train.seed},
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            num_samples=num_trials,
            scheduler=scheduler,
            time_budget_s=None if math.isinf(seconds) else seconds,
            reuse_actors=spec.plan.num_workers == 1 and not spec.plan.use_gpu,  # an error may leave CUDA unusable
        ),
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=run.uri,
            callbacks=[watcher],
            progress_reporter=tune.CLIReporter(),  # in a notebook, Tune's default would clear the cell's output
            failure_config=tune.FailureConfig(max_failures=sweep.job.workers.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()
    run.inside(_TUNE_FOLDER).delete()


def _scheduler(sweep: Sweep, table: TrialTable) -> TrialScheduler:
    """Return ASHA (https://arxiv.org/abs/1810.05934): at each rung the worse half of the trials so far stops.

    In a resumed sweep, trials are also compared with the reports of finished trials.
    """
    if sweep.config.scheduler == "none":
        return FIFOScheduler()
    num_epochs = sweep.job.train.num_epochs
    first_rung = min(1, num_epochs / 4)
    asha = ASHAScheduler("epochs", **_goal(table), max_t=num_epochs, grace_period=first_rung, reduction_factor=2)
    for record in table.finished():
        if record.state != FAILED:
            trial = SimpleNamespace(trial_id=f"before-{record.trial}")
            asha.on_trial_add(None, trial)
            for epochs, monitor in record.reported:
                asha.on_trial_result(None, trial, {"epochs": epochs, _goal(table)["metric"]: monitor})
    return asha


def _goal(table: TrialTable) -> dict[str, str]:
    monitor = table.workload.monitor
    return {"metric": f"val_{monitor.name}", "mode": monitor.mode}


def _optuna(sweep: Sweep, table: TrialTable, concurrent: int) -> tuple[ConcurrencyLimiter, int]:
    """Return Optuna's TPE and the number of trials left. TPE starts with unfinished trials and knows finished ones."""
    from optuna import distributions  # an extra

    seed, space = sweep.job.train.seed, dict[str, Any]()
    for name, some in sweep.space.spaces.items():
        if isinstance(some, Choice):
            space[name] = distributions.CategoricalDistribution(some.options)
        else:
            is_int = sweep.space.types[name] is int
            kind = distributions.IntDistribution if is_int else distributions.FloatDistribution
            space[name] = kind(some.low, some.high, log=some.log)
    finished = [record for record in table.finished() if record.point.seed == seed]
    first = table.unfinished(table.by_point) if table.by_point else sweep.space.default_points(seed)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    algorithm = OptunaSearch(
        space,
        **_goal(table),
        points_to_evaluate=[point.values for point in first],
        seed=seed + len(finished),  # a resumed search must not propose the same points again
    )
    for record in finished:
        if record.state != FAILED:
            algorithm.add_evaluated_point(record.point.values, record.val_monitor)
    return ConcurrencyLimiter(algorithm, concurrent), sweep.config.num_trials - len(finished)


@dataclass(eq=False)
class _Watcher(tune.Callback):
    """Keeps the table, sweep.csv and the checkpoints on disk up to date."""

    sweep: Sweep
    table: TrialTable
    on_change: OnChange

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle nothing: Tune pickles callbacks for its own restore, which is never used."""
        return tune.Callback, ()

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        self.table.start(self._point(trial))
        self._changed()

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        record = self.table.by_point[self._point(trial)]
        self.table.update(record, result)
        if "epochs" in result:
            record.report(result["epochs"], record.val_monitor)
        self._changed()

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        record = self.table.by_point[self._point(trial)]
        ended = DONE if (trial.last_result or {}).get("is_over") else STOPPED
        record.state = FAILED if record.reason else ended
        self._changed(record)
        kept = self.table.contenders(self.sweep.config, self.sweep.job.train.seed)
        _drop_checkpoints(self.sweep.job.run, self.table, kept)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        # The trial's processes have died too often. If they died before the trial started, it has no record yet.
        record = self.table.start(self._point(trial))
        record.state, record.reason = LOST, reason_of(trial)
        self._changed()

    def end(self) -> None:
        """Mark the trials that were cut off when the time was up: Tune does not report them."""
        for record in self.table.by_point.values():
            if record.state == RUNNING:
                record.state = STOPPED
        self._changed()

    def _point(self, trial: Trial) -> Point:
        return self.sweep.space.point(trial.config, trial.config["seed"])

    def _changed(self, ended: TrialRecord | None = None) -> None:
        self.sweep.job.run.write_text(TRIALS_FILE, self.table.to_csv())
        self.on_change(self.table, ended)


def _drop_checkpoints(run: RunFolder, table: TrialTable, kept: Container[Point]) -> None:
    """Delete the checkpoints of finished trials except ``kept``, so that a sweep's disk use does not grow."""
    trials = run.inside(TRIALS_FOLDER)
    dropped = {record.point.name for record in table.finished() if record.point not in kept}
    for name in dropped.intersection(with_retries(trials.subfolders)):
        trials.inside(name).delete()


def reason_of(trial: Trial) -> str:
    """Return the last line of a failed trial's error text, without secrets: the exception and its message."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    last_line = text.strip().rpartition("\n")[2].strip()
    return masked(re.sub(r"^([a-z_]\w*\.)+", "", last_line)) or "it gave no reason"
