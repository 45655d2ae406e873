"""The sweep: Ray Tune proposes points, runs trials and stops the bad ones; here it is set up and watched."""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, masked
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder, with_retries
from mnist_ray.sweep.space import Point, Space, propose
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.sweep.trials import DONE, FAILED, LOST, STOPPED, TrialTable

TRIALS_FOLDER = "trials"
_TUNE_FOLDER = "tune"
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: sweep.csv and the trials' checkpoints are what resumes
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune's CSV, JSON and TensorBoard files a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box with its configuration even with verbose=0
}


def trials_at_a_time(sweep: SweepConfig, plan: WorkerPlan, cluster: Cluster, *, autoscaling: bool) -> int:
    """Return how many trials the cluster holds at once, at most what was asked for: none ever waits for another.

    Where the cluster starts nodes on demand, it is what was asked for: the trials that wait are the demand.
    """
    cpus = plan.cpus_per_worker
    if plan.use_gpu:
        workers = sum(min(node.num_gpus, node.num_cpus // cpus) for node in cluster.nodes)
    else:
        workers = sum(node.num_cpus // cpus for node in cluster.nodes)
    held = max(1, workers // plan.num_workers)
    asked = sweep.max_concurrent_trials or held
    return min(asked if autoscaling else min(held, asked), sweep.num_trials)


def run_sweep(
    sweep: SweepConfig,
    space: Space,
    spec: TrialSpec,
    run: RunFolder,
    concurrent: int,
    on_change: Callable[[TrialTable], None],
) -> TrialTable:
    """Run a sweep's trials, or those that ``run`` does not hold as finished yet; return what came of all.

    ``on_change`` gets the table whenever it has changed. Raises JobError where every trial failed.
    """
    os.environ.update(_SETTINGS)
    table = TrialTable(type(spec.job.workload), space).read(run)
    config = spec.job.train
    watcher = _Watcher(sweep, config.seed, table, run, on_change)
    num_epochs = space.largest("num_epochs", config.num_epochs)
    deadline = time.monotonic() + (sweep.time_budget_s or math.inf)

    def run_stage(points: list[Point], scheduler: TrialScheduler, search: dict[str, Any] | None = None) -> None:
        """Run trials of ``points``, or those that ``search`` proposes, until they are done or the time is up."""
        left = [point for point in points if not table.is_finished(point)]
        table.num_planned = max(table.num_planned, len(table.by_point.keys() | set(points)))
        seconds_left = deadline - time.monotonic()
        if seconds_left > 0 and (left or search):
            _run_trials(space, spec, run, watcher, scheduler, search or _in_order(left, concurrent), seconds_left)

    if sweep.search == "optuna":
        table.num_planned = sweep.num_trials
        run_stage([], _scheduler(sweep, num_epochs, table), _optuna(sweep, config.seed, table, concurrent))
    else:
        run_stage(propose(space, sweep, config.seed), _scheduler(sweep, num_epochs, table))
    run_stage(table.confirmations(sweep, config.seed), FIFOScheduler())
    if table.best is None:
        reasons = [record.reason for record in table.by_point.values() if record.reason]
        again = f"; to try again those that were lost: {spec.job.resume_with}" if table.count(LOST) else ""
        raise JobError(f"every trial failed; the first one: {reasons[0] if reasons else 'the time was up'}{again}")
    _drop_checkpoints(run, table, kept={table.rank(table.best.records)[0].point})
    return table


def _run_trials(
    space: Space,
    spec: TrialSpec,
    run: RunFolder,
    watcher: tune.Callback,
    scheduler: TrialScheduler,
    search: dict[str, Any],
    seconds: float,
) -> None:
    """Let Tune run the trials that ``search``, a part of ``TuneConfig``, proposes."""
    tune_folder, monitor = run.inside(_TUNE_FOLDER), spec.job.workload.monitor
    tune_folder.delete()  # of an interrupted sweep; it is never read
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(run_trial, spec=spec), _resources(spec.plan)),
        # filled in by the search; the seed stays where the search proposes none
        param_space={**dict.fromkeys(space.spaces), "seed": spec.job.train.seed},
        tune_config=tune.TuneConfig(
            metric=f"val_{monitor.name}",
            mode=monitor.mode,
            scheduler=scheduler,
            time_budget_s=None if math.isinf(seconds) else seconds,
            reuse_actors=spec.plan.num_workers == 1,
            **search,
        ),
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=run.uri,
            callbacks=[watcher],
            progress_reporter=_Silent(),
            failure_config=tune.FailureConfig(max_failures=spec.job.workers.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()
    tune_folder.delete()


def _resources(plan: WorkerPlan) -> tune.PlacementGroupFactory:
    """Return what Tune reserves for a trial: a lone worker's CPUs; none where the trial only waits for its workers."""
    if plan.num_workers > 1:
        return tune.PlacementGroupFactory([{"memory": 2**20}])  # Tune has to reserve something
    return tune.PlacementGroupFactory([{"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})}])


def _scheduler(sweep: SweepConfig, num_epochs: int, table: TrialTable) -> TrialScheduler:
    """ASHA (https://arxiv.org/abs/1810.05934): at each rung the worse half of the trials so far stops."""
    if sweep.scheduler == "none":
        return FIFOScheduler()
    finished = [record for record in table.by_point.values() if record.is_finished and record.state != FAILED]
    return _ResumedASHA([record.reported for record in finished], num_epochs)


class _ResumedASHA(ASHAScheduler):
    """Knows what the trials have reported that a sweep had finished before it was interrupted."""

    def __init__(self, reported: Sequence[Sequence[tuple[float, float]]], num_epochs: int) -> None:
        first = min(1, num_epochs / 4)
        super().__init__(time_attr="epochs", max_t=num_epochs, grace_period=first, reduction_factor=2)
        self._reported = reported

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take what is compared, and compare what was reported before."""
        is_taken = super().set_search_properties(metric, mode, **spec)
        for number, reports in enumerate(self._reported):
            trial = SimpleNamespace(trial_id=f"before-{number}")
            self.on_trial_add(None, trial)
            for epochs, monitor in reports:
                self.on_trial_result(None, trial, {"epochs": epochs, metric: monitor})
        return is_taken


def _in_order(points: list[Point], concurrent: int) -> dict[str, Any]:
    """Return the part of ``TuneConfig`` that tries given points."""
    presets = [{**point.values, "seed": point.seed} for point in points]
    algorithm = BasicVariantGenerator(points_to_evaluate=presets, max_concurrent=concurrent)
    return {"search_alg": algorithm, "num_samples": len(points)}


def _optuna(sweep: SweepConfig, seed: int, table: TrialTable, concurrent: int) -> dict[str, Any] | None:
    """Return the part of ``TuneConfig`` that asks Optuna's TPE for what is left to try; None where nothing is.

    It is told of the trials that are finished already; those that a resumed sweep finds unfinished come first.
    """
    finished = [record for record in table.by_point.values() if record.is_finished and record.point.seed == seed]
    unfinished = [record.point for record in table.by_point.values() if not record.is_finished]
    if len(finished) >= sweep.num_trials:
        return None
    import optuna  # an extra; that it is there was checked before
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monitor, first = table.workload.monitor, unfinished if table.by_point else table.space.default_points(seed)
    distributions: dict[str, Any] = {}
    for name, space in table.space.spaces.items():
        if isinstance(space, Choice):
            distributions[name] = optuna.distributions.CategoricalDistribution(space.options)
        elif table.space.types[name] is int:
            distributions[name] = optuna.distributions.IntDistribution(int(space.low), int(space.high), log=space.log)
        else:
            distributions[name] = optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)
    search = OptunaSearch(
        space=distributions,
        metric=f"val_{monitor.name}",
        mode=monitor.mode,
        points_to_evaluate=[point.values for point in first],
        seed=seed + len(finished),  # a resumed search does not draw what it has drawn
    )
    for record in finished:
        if record.state != FAILED:
            search.add_evaluated_point(record.point.values, record.val_monitor)
    limited = ConcurrencyLimiter(search, concurrent)
    return {"search_alg": limited, "num_samples": sweep.num_trials - len(finished)}


class _Silent(tune.ProgressReporter):
    """Reports nothing: in a notebook, Tune's own would clear the cell's output, even where it has nothing to say."""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        """Return that there is nothing to report."""
        return False

    def report(self, trials: list[Trial], done: bool, *sys_info: dict) -> None:
        """Report nothing."""


class _Watcher(tune.Callback):
    """Keeps the table, sweep.csv and the disk up to date as trials go."""

    def __init__(
        self,
        sweep: SweepConfig,
        seed: int,
        table: TrialTable,
        run: RunFolder,
        on_change: Callable[[TrialTable], None],
    ) -> None:
        self._sweep = sweep
        self._seed = seed
        self._table = table
        self._run = run
        self._on_change = on_change

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Leave nothing of it in what Tune pickles for a restore of its own, which is never made."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note a trial that starts, or starts again after a failure."""
        self._table.start(self._point(trial))
        self._changed()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a trial's figures."""
        record = self._table.by_point[self._point(trial)]
        for name, column in self._table.columns.items():
            if column in result:
                setattr(record, name, result[column])
        if "epochs" in result:
            record.report(result["epochs"], record.val_monitor)
        self._changed()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note a trial that ended, by itself or stopped."""
        record = self._table.by_point[self._point(trial)]
        ended = DONE if (trial.last_result or {}).get("is_over") else STOPPED  # by the scheduler, or the time's end
        record.state = FAILED if record.reason else ended
        self._finished()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note a trial whose processes have died too often."""
        record = self._table.start(self._point(trial))  # one that died before it started has no record yet
        record.state, record.reason = LOST, reason_of(trial)
        self._finished()

    def _point(self, trial: Trial) -> Point:
        return self._table.space.point(trial.config, trial.config["seed"])

    def _finished(self) -> None:
        """Drop the checkpoints that cannot be the best's any more."""
        self._changed()
        _drop_checkpoints(self._run, self._table, self._table.contenders(self._sweep, self._seed))

    def _changed(self) -> None:
        self._run.write_text(TRIALS_FILE, self._table.to_csv())
        self._on_change(self._table)


def _drop_checkpoints(run: RunFolder, table: TrialTable, kept: Container[Point]) -> None:
    """Delete the checkpoints of finished trials but those of ``kept``, so that a sweep's disk use does not grow."""
    trials = run.inside(TRIALS_FOLDER)
    dropped = {point.name for point, record in table.by_point.items() if record.is_finished and point not in kept}
    for name in dropped.intersection(with_retries(trials.subfolders)):
        trials.inside(name).delete()


def reason_of(trial: Trial) -> str:
    """Return the last line of a failed trial's error text, without secrets: the exception and its message."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    last_line = text.strip().rpartition("\n")[2].strip()
    return masked(re.sub(r"^([a-z_]\w*\.)+", "", last_line)) or "it gave no reason"
