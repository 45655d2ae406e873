"""The result of a job of many runs: means and their intervals, the run that is kept, the predictions of all folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnist_ray.checkpoints.state_file import CheckpointMetrics
from mnist_ray.config import TrainConfig
from mnist_ray.job.job import Job
from mnist_ray.job.session import Session
from mnist_ray.many.table import Many
from mnist_ray.output import finite
from mnist_ray.provenance import origin
from mnist_ray.report import page
from mnist_ray.report.columns import read_columns, write_columns
from mnist_ray.report.intervals import mean_interval
from mnist_ray.report.run_files import number_of
from mnist_ray.settings import json_lines
from mnist_ray.storage import MEMBERS_FOLDER, REPORT_FILE, RESULT_FILE
from mnist_ray.text import count
from mnist_ray.workload.figures import NOT_PREDICTED, RATE

Results = Mapping[str, Mapping[str, Any]]  # result.json of each member, by the name of its folder


def write(session: Session, many: Many, members: Sequence[Job]) -> None:
    """Write and print the result of a job from ``members``, which are tested: all, or those of the best configuration.

    Raises JobError.
    """
    job, run, console, config, test = many.job, many.job.run, session.console, many.job.train, session.data.test
    results = {member.run.name: member.run.require_json(RESULT_FILE) for member in members}
    kept = max(members, key=lambda member: _metrics_of(results[member.run.name]).score)
    columns = _of_folds(members, config.seed) if config.is_folded else read_columns(kept.run)
    predictions = {name: values for name, values in columns.items() if name not in NOT_PREDICTED}
    if columns and (note := write_columns(run, columns)):
        console.say("note", note)
    session.clock.mark("test" if many.is_sweep else "runs")
    result = {
        **results[kept.run.name],
        **_summary(config, results, [f"test_{metric.name}" for metric in job.workload.all_metrics]),
        **({"num_test_examples": len(test)} if config.is_folded else {}),
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
    said, several = [], len(result["members"]) > 1
    for metric in (*metrics[1:], metrics[0]):
        text = f"{metric.name} {metric.format(number_of(result[f'test_{metric.name}']))}"
        if several:
            low, high = map(metric.format, result["spread"][f"test_{metric.name}"]["interval"])
            text += f" (95 %: {low} to {high})"
        said.append(text)
    of = f": mean of {count(len(result['members']), 'run')}" if several else ""
    console.result("test", f"{', '.join(said)}{of} on {result['num_test_examples']:,} {job.workload.nouns}")
    if job.train.is_folded:
        console.say("", "the interval allows for the folds' common training examples (Nadeau and Bengio, 2003)")
    why = "the best by validation" if _metrics_of(result).is_validated else "the first, as nothing is held out"
    console.result("checkpoint", f"{run.inside(result['checkpoint']).uri} ({why})")
    console.result("result", run.inside(RESULT_FILE).uri)
    console.result("report", run.inside(REPORT_FILE).uri)
