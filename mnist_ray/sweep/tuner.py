"""The sweep on Ray Tune: it proposes points, runs trials and stops the bad ones; here it is set up and watched."""

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
from ray.tune.search.optuna import OptunaSearch  # without Optuna, which is an extra, only its use fails

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, masked
from mnist_ray.settings import Choice
from mnist_ray.storage import TRIALS_FILE, RunFolder, with_retries
from mnist_ray.sweep.options import Sweep
from mnist_ray.sweep.space import Point, propose
from mnist_ray.sweep.trial import TrialSpec, run_trial
from mnist_ray.sweep.trials import DONE, FAILED, LOST, STOPPED, TrialRecord, TrialTable

TRIALS_FOLDER, _TUNE_FOLDER = "trials", "tune"
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: sweep.csv and the trials' checkpoints are what resumes
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune's CSV, JSON and TensorBoard files a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box with its configuration even with verbose=0
}
OnChange = Callable[[TrialTable, TrialRecord | None], None]
"""Gets the table whenever it has changed, with the trial that has ended, if one has."""


def trials_at_a_time(sweep: SweepConfig, plan: WorkerPlan, cluster: Cluster, *, autoscaling: bool) -> int:
    """Return how many trials the cluster holds at once, at most what was asked for: none ever waits for another.

    With ``autoscaling`` it is what was asked for: the trials that wait let the cluster start nodes.
    """
    cpus = plan.cpus_per_worker
    if plan.use_gpu:
        workers = sum(min(node.num_gpus, node.num_cpus // cpus) for node in cluster.nodes)
    else:
        workers = sum(node.num_cpus // cpus for node in cluster.nodes)
    held = max(1, workers // plan.num_workers)
    asked = sweep.max_concurrent_trials or held
    return min(asked if autoscaling else min(held, asked), sweep.num_trials)


def run_sweep(sweep: Sweep, spec: TrialSpec, concurrent: int, on_change: OnChange) -> TrialTable:
    """Run a sweep's trials, except those that its folder holds as finished; return all.

    Raises JobError if every trial failed.
    """
    os.environ.update(_SETTINGS)
    config, table, seed = sweep.config, sweep.table(), sweep.job.train.seed
    watcher = _Watcher(sweep, table, on_change)
    deadline = time.monotonic() + (config.time_budget_s or math.inf)

    def run_trials(scheduler: TrialScheduler, algorithm: Any, num_trials: int) -> None:
        """Run the trials that ``algorithm`` proposes until they are done or the time is up."""
        seconds = deadline - time.monotonic()
        if num_trials > 0 and seconds > 0:
            tune_config = tune.TuneConfig(
                search_alg=algorithm,
                num_samples=num_trials,
                scheduler=scheduler,
                time_budget_s=None if math.isinf(seconds) else seconds,
                reuse_actors=spec.plan.num_workers == 1,
            )
            _run_trials(sweep, spec, watcher, tune_config)

    if config.search == "optuna":
        table.num_planned = config.num_trials
        run_trials(_scheduler(sweep, table), *_optuna(sweep, table, concurrent))
    else:
        points = table.plan(propose(sweep.space, config, seed))
        run_trials(_scheduler(sweep, table), *_in_order(points, concurrent))
    run_trials(FIFOScheduler(), *_in_order(table.plan(table.confirmations(config, seed)), concurrent))
    if table.best is None:
        reasons = [record.reason for record in table.by_point.values() if record.reason]
        again = f"; to try again those that were lost: {sweep.job.resume_with}" if table.count(LOST) else ""
        raise JobError(f"every trial failed; the first one: {reasons[0] if reasons else 'the time was up'}{again}")
    _drop_checkpoints(sweep.job.run, table, kept={max(table.best.records, key=table.worth).point})
    return table


def _run_trials(sweep: Sweep, spec: TrialSpec, watcher: tune.Callback, config: tune.TuneConfig) -> None:
    """Let Tune run trials."""
    run = sweep.job.run
    run.inside(_TUNE_FOLDER).delete()  # an interrupted sweep's; it is never read
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(run_trial, spec=spec), _resources(spec.plan)),
        # filled in by the search; the seed stays if the search proposes none
        param_space={**dict.fromkeys(sweep.space.spaces), "seed": sweep.job.train.seed},
        tune_config=config,
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=run.uri,
            callbacks=[watcher],
            progress_reporter=tune.CLIReporter(),  # in a notebook, Tune's own would clear the cell's output
            failure_config=tune.FailureConfig(max_failures=sweep.job.workers.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()
    run.inside(_TUNE_FOLDER).delete()


def _resources(plan: WorkerPlan) -> tune.PlacementGroupFactory:
    """Return what Tune reserves for a trial: a lone worker's CPUs; nothing if the trial only waits for its workers."""
    if plan.num_workers > 1:
        return tune.PlacementGroupFactory([{"memory": 2**20}])  # Tune has to reserve something
    return tune.PlacementGroupFactory([{"CPU": plan.cpus_per_worker, **({"GPU": 1} if plan.use_gpu else {})}])


def _scheduler(sweep: Sweep, table: TrialTable) -> TrialScheduler:
    """ASHA (https://arxiv.org/abs/1810.05934): at each rung the worse half of the trials so far stops.

    In a resumed sweep it compares with the reports of the finished trials, too.
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


def _in_order(points: list[Point], concurrent: int) -> tuple[BasicVariantGenerator, int]:
    """Return what proposes given points, and their number."""
    presets = [{**point.values, "seed": point.seed} for point in points]
    return BasicVariantGenerator(points_to_evaluate=presets, max_concurrent=concurrent), len(points)


def _optuna(sweep: Sweep, table: TrialTable, concurrent: int) -> tuple[ConcurrencyLimiter, int]:
    """Return Optuna's TPE, which knows of the finished trials and begins with the unfinished; and how many are left."""
    seed = sweep.job.train.seed
    finished = [record for record in table.finished() if record.point.seed == seed]
    unfinished = [record.point for record in table.by_point.values() if not record.is_finished]
    first = unfinished if table.by_point else sweep.space.default_points(seed)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    algorithm = OptunaSearch(
        OptunaSearch.convert_search_space({name: _domain(sweep, name) for name in sweep.space.spaces}),
        **_goal(table),
        points_to_evaluate=[point.values for point in first],
        seed=seed + len(finished),  # a resumed search does not draw what it has drawn
    )
    for record in finished:
        if record.state != FAILED:
            algorithm.add_evaluated_point(record.point.values, record.val_monitor)
    return ConcurrencyLimiter(algorithm, concurrent), sweep.config.num_trials - len(finished)


def _domain(sweep: Sweep, name: str) -> Any:
    """Return the space of a setting as Tune has it, whose ranges of whole numbers lack their upper end."""
    space = sweep.space.spaces[name]
    if isinstance(space, Choice):
        return tune.choice(list(space.options))
    if sweep.space.types[name] is int:
        return (tune.lograndint if space.log else tune.randint)(int(space.low), int(space.high) + 1)
    return (tune.loguniform if space.log else tune.uniform)(space.low, space.high)


@dataclass(eq=False)
class _Watcher(tune.Callback):
    """Keeps the table, sweep.csv and the disk up to date as trials go."""

    sweep: Sweep
    table: TrialTable
    on_change: OnChange

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Leave nothing of it in what Tune pickles for a restore of its own, which is never made."""
        return tune.Callback, ()

    def on_trial_start(self, trial: Trial, **info: Any) -> None:
        self.table.start(self._point(trial))
        self._changed()

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        record = self.table.by_point[self._point(trial)]
        for name, column in self.table.columns.items():
            if column in result:
                setattr(record, name, result[column])
        if "epochs" in result:
            record.report(result["epochs"], record.val_monitor)
        self._changed()

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        record = self.table.by_point[self._point(trial)]
        ended = DONE if (trial.last_result or {}).get("is_over") else STOPPED  # by the scheduler, or the time's end
        record.state = FAILED if record.reason else ended
        self._changed(record)
        kept = self.table.contenders(self.sweep.config, self.sweep.job.train.seed)
        _drop_checkpoints(self.sweep.job.run, self.table, kept)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        # Its processes have died too often; if they did so before it started, it has no record yet.
        record = self.table.start(self._point(trial))
        record.state, record.reason = LOST, reason_of(trial)
        self._changed()

    def _point(self, trial: Trial) -> Point:
        return self.sweep.space.point(trial.config, trial.config["seed"])

    def _changed(self, ended: TrialRecord | None = None) -> None:
        self.sweep.job.run.write_text(TRIALS_FILE, self.table.to_csv())
        self.on_change(self.table, ended)


def _drop_checkpoints(run: RunFolder, table: TrialTable, kept: Container[Point]) -> None:
    """Delete the checkpoints of finished trials but those of ``kept``, so that a sweep's disk use does not grow."""
    trials = run.inside(TRIALS_FOLDER)
    dropped = {record.point.name for record in table.finished() if record.point not in kept}
    for name in dropped.intersection(with_retries(trials.subfolders)):
        trials.inside(name).delete()


def reason_of(trial: Trial) -> str:
    """Return the last line of a failed trial's error text, without secrets: the exception and its message."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    last_line = text.strip().rpartition("\n")[2].strip()
    return masked(re.sub(r"^([a-z_]\w*\.)+", "", last_line)) or "it gave no reason"
