"""A job of many runs on a connected Ray: the training of its members, the choice, the test of the best, the result."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from mnist_ray.checkpoints.find import best_of
from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.cluster.remote_data import may_be_stored
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Data, Split
from mnist_ray.job.job import Job
from mnist_ray.job.session import Clock, Session
from mnist_ray.many.console import ManyConsole
from mnist_ray.many.executor import MemberSpec, QuietConsole, at_a_time, train_members
from mnist_ray.many.points import Configuration
from mnist_ray.many.rungs import Averaged, averaged, error_of_fraction, find_best
from mnist_ray.many.table import Many, Table
from mnist_ray.output import finite
from mnist_ray.provenance import origin
from mnist_ray.record.header import say_plan
from mnist_ray.record.recorder import logs_named, write_settings
from mnist_ray.report import page
from mnist_ray.report.columns import read_columns, write_columns
from mnist_ray.report.intervals import mean_interval
from mnist_ray.report.run_files import DONE, number_of
from mnist_ray.run import fit
from mnist_ray.schema import BEST_FILE, MEMBERS_FILE, MEMBERS_FOLDER, REPORT_FILE, RESULT_FILE
from mnist_ray.settings import json_lines
from mnist_ray.text import count, format_settings
from mnist_ray.workload.calls import splits_for
from mnist_ray.workload.figures import IN_WORDS, NOT_PREDICTED, RATE

Results = Mapping[str, Mapping[str, Any]]  # result.json of each member, by the name of its folder
_LARGE_ERROR = 0.01  # of the validation, as a fraction: smaller ones need no words


def train_many(session: Session, plan: WorkerPlan, many: Many, data: Data) -> None:
    """Train the members that are not finished; of a sweep, choose and test the best; write the result.

    A sweep that has chosen its best configuration runs no more trials, so that the choice does not change. Raises
    JobError and TrainingStoppedError.
    """
    run, configuration = many.job.run, Configuration()
    say_plan(session, plan)
    write_settings(session, plan, many.values)
    with logs_named(session):
        table = many.table() if run.exists(BEST_FILE) else _train_all(session, plan, many, data)
        if many.is_sweep:
            configuration = _choose(session, many, table)
            _test(session, plan, many, data, table, configuration)
    _write(session, many, [many.member(point) for point in many.points(configuration)])


def _train_all(session: Session, plan: WorkerPlan, many: Many, data: Data) -> Table:
    """Train the members, and show them; return their table."""
    console = session.console
    assert isinstance(console, ManyConsole)
    are_stored = not session.is_here and all(may_be_stored(Split(part)) for part in data.parts.values())
    spec = MemberSpec(
        many,
        plan,
        session.cluster,
        session.repository.result(),
        tuple(sys.argv),
        ray.put(data) if are_stored else None,  # else, each process loads them
    )
    concurrent = at_a_time(many, plan, session.cluster)
    console.say("at a time", count(concurrent, "run"))
    console.waiting("starting …")
    table = train_members(spec, data, concurrent, console.show_table, console.say)
    if many.is_sweep:
        console.show_result(table)
    session.clock.mark("runs")
    return table


def _choose(session: Session, many: Many, table: Table) -> Configuration:
    """Choose the best configuration; write it, and print it and the default."""
    console, run, monitor, chosen = session.console, many.job.run, many.job.workload.monitor, find_best(table)
    assert chosen is not None  # else train_members has raised
    run.write_text(BEST_FILE, json_lines(many.job.with_values(dict(chosen.configuration)).values))
    console.say("files", f"{run.inside(MEMBERS_FILE).uri}, {BEST_FILE}")

    def said(each: Averaged) -> str:
        value = f"{monitor.format(each.val_monitor)} validation {monitor.name}, {each.mean_of}"
        return f"{value}: {format_settings(dict(each.configuration))}"

    console.say("best", said(chosen))
    default = None if many.space.default is None else averaged(table, many.space.default)
    if default is not None and default.configuration != chosen.configuration:
        console.say("default", said(default))
    elif default is not None:
        console.say("default", "it is the best")
    number = many.num_validation
    fraction = (chosen.val_monitor * number + 1) / (number + 2)  # else 100 % of few would have no error
    if monitor.is_fraction and (error := error_of_fraction(fraction, number)) > _LARGE_ERROR:
        few = f"on {count(number, many.job.workload.noun)} of validation"
        console.say("note", f"{few}, configurations that differ by less than {error:.0%} may be as good")
    return chosen.configuration


def _test(
    session: Session, plan: WorkerPlan, many: Many, data: Data, table: Table, configuration: Configuration
) -> None:
    """Test the runs of the chosen configuration; first train again one that was lost."""
    for point in many.points(configuration):
        job, member = many.member(point), table.by_point.get(point)
        if not job.run.exists(RESULT_FILE):
            is_done = member is not None and member.state == DONE
            splits = splits_for(job.workload, data, job.train)
            own = dataclasses.replace(session, job=job, data=splits, console=QuietConsole(job), clock=Clock())
            fit.train_run(own, plan, trained=best_of(job.run) if is_done else None, is_last=False)


def _write(session: Session, many: Many, members: Sequence[Job]) -> None:
    """Write and print the result of a job from ``members``, which are tested: all, or those of the best configuration.

    Raises JobError.
    """
    job, run, console, config, test = many.job, many.job.run, session.console, many.job.train, session.data.test
    evaluated = session.data.evaluated
    results = {member.run.name: member.run.require_json(RESULT_FILE) for member in members}
    kept = max(members, key=lambda member: _metrics_of(results[member.run.name]).score)
    columns = _of_folds(members, config.seed) if config.is_folded else read_columns(kept.run)
    predictions = {name: values for name, values in columns.items() if name not in NOT_PREDICTED}
    if columns and (note := write_columns(run, columns)):
        console.say("note", note)
    session.clock.mark("test" if many.is_sweep else "runs")
    result = {
        **results[kept.run.name],
        **_summary(config, results, [f"{evaluated}_{metric.name}" for metric in job.workload.all_metrics]),
        **({f"num_{evaluated}_examples": len(test)} if config.is_folded else {}),
        **(job.workload.details(predictions) if "fold" in columns else {}),
        "members": [f"{MEMBERS_FOLDER}/{name}" for name in results],
        "checkpoint": f"{MEMBERS_FOLDER}/{kept.run.name}/{results[kept.run.name]['checkpoint']}",
        "seconds": session.clock.seconds(),
        "is_resumed": job.is_resumed,
        **origin(),
    }
    run.write_text(RESULT_FILE, json_lines(finite(result)))
    page.write(run, kept.workload, job.resume_with, test, lambda note: console.say("note", note))
    _say(session, result, kept)


def _metrics_of(result: Mapping[str, Any]) -> CheckpointMetrics:
    return CheckpointMetrics.of(result["checkpoint_metrics"])


def _summary(config: TrainConfig, results: Results, names: Sequence[str]) -> dict[str, Any]:
    """Return the mean of each figure over several runs and, by its name, their values and the mean's 95 % interval."""
    if len(results) == 1:
        return {}
    overlap = 1 / (config.folds - 1) if config.is_folded and config.folds else 0.0
    values = {name: [number_of(result.get(name)) for result in results.values()] for name in (*names, RATE)}
    spread = {
        name: {"values": values[name], "interval": mean_interval(values[name], overlap=overlap)} for name in names
    }
    means = {name: float(np.mean(of_members)) for name, of_members in values.items()}
    return {**means, "spread": spread}


def _of_folds(members: Sequence[Job], seed: int) -> dict[str, np.ndarray]:
    """Return the columns of the predictions of one seed's folds, in the order of the data, (N, ...) each.

    There are none if those of a fold are missing. Raises JobError.
    """
    folds = [read_columns(member.run) for member in members if member.train.seed == seed]
    if not all(folds):
        return {}
    order = np.argsort(np.concatenate([columns["index"] for columns in folds]))
    joined = {name: np.concatenate([columns[name] for columns in folds])[order] for name in folds[0]}
    numbers = np.repeat(np.arange(1, len(folds) + 1), [len(columns["index"]) for columns in folds])
    return {"fold": numbers[order], **joined}


def _say(session: Session, result: Mapping[str, Any], kept: Job) -> None:
    """Print the means, the run that is kept, and the paths of the files."""
    job, console, run, metrics = session.job, session.console, session.job.run, session.job.workload.all_metrics
    said, evaluated = [], session.data.evaluated
    for metric in (*metrics[1:], metrics[0]):
        said.append(f"{metric.name} {metric.format(number_of(result[f'{evaluated}_{metric.name}']))}")
        if "spread" in result:
            low, high = map(metric.format, result["spread"][f"{evaluated}_{metric.name}"]["interval"])
            said[-1] += f" (95 %: {low} to {high})"
    of = f": mean of {count(len(result['members']), 'run')}" if "spread" in result else ""
    number = f"{result[f'num_{evaluated}_examples']:,} {job.workload.nouns}"
    console.result(IN_WORDS[evaluated], f"{', '.join(said)}{of} on {number}")
    if job.train.is_folded:
        console.say("", "the interval allows for the folds' common training examples (Nadeau and Bengio, 2003)")
    why = "the best by validation" if _metrics_of(result).is_validated else "the first, as nothing is held out"
    console.result("checkpoint", f"{run.inside(result['checkpoint']).uri} ({why})")
    console.result("result", run.inside(RESULT_FILE).uri)
    console.result("report", run.inside(REPORT_FILE).uri)
