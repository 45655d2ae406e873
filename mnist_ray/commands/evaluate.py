"""Evaluate a checkpoint on the test set, as Ray tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.cluster.forking.starting import Forking, prepared_forking
from mnist_ray.config import EvaluationConfig, LookupConfig, WorkerConfig
from mnist_ray.settings import build, names_of
from mnist_ray.tools import flags
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data

if TYPE_CHECKING:
    from mnist_ray.run.find import Found
    from mnist_ray.training.metrics import Evaluation


def main() -> None:
    """Read the flags, then evaluate."""
    workload_class = flags.workload_class(EvaluationConfig, LookupConfig)
    parser = cli.Parser(
        "Evaluate a checkpoint on the test set.", EvaluationConfig, workload_class.Settings, LookupConfig
    )
    flags.add_run(parser, "checkpoint")
    given = parser.read_flags()
    environment.prepare(verbose=False)
    with prepared_forking(WorkerConfig(), "mnist_ray.run.evaluate") as forking:
        from mnist_ray.run.find import find  # imports torch and Ray, after the flags are known to be right

        changes = {name: given[name] for name in names_of([workload_class.Settings]) if name in given}
        found = find(given["checkpoint"], build(LookupConfig, given).storage_path, given.get("workload"), changes)
        evaluate(found, build(EvaluationConfig, given), forking)


def evaluate(found: Found, config: EvaluationConfig, forking: Forking) -> Evaluation:
    """Connect, evaluate, print what came out, and return it. Raises as ``train`` does."""
    from mnist_ray.cluster.connect import connect
    from mnist_ray.run import evaluate
    from mnist_ray.run.session import console_of, print_evaluation

    workload, data = found.workload, load_data(found.workload)
    test = Split(data.test, origin="test")
    with connect(WorkerConfig(), forking), console_of(workload) as console:
        for note in found.notes:
            console.say("note", note)
        console.say("checkpoint", found.checkpoint.path)
        console.say("data", f"{data.name}: {len(test):,} test {workload.nouns}")
        tested = evaluate.evaluate(workload, found.checkpoint, test, config.num_tasks)
        print_evaluation(console, workload, tested)
        return tested
