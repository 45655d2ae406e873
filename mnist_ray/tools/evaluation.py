"""A checkpoint's evaluation on the test set: ``jobs/evaluate.py`` once its flags are read."""

from __future__ import annotations

from mnist_ray.cluster.connect import connect
from mnist_ray.config import EvaluationConfig, WorkerConfig
from mnist_ray.run.console import RunConsole
from mnist_ray.run.evaluate import evaluate
from mnist_ray.run.find import Found
from mnist_ray.run.record import print_evaluation
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data
from ray_fork.starting import Forking


def evaluate_found(found: Found, config: EvaluationConfig, forking: Forking) -> Evaluation:
    """Connect, evaluate, print what came out, and return it. Raises as ``train`` does."""
    workload, data = found.workload, load_data(found.workload)
    test = Split(data.test, origin="test")
    with connect(WorkerConfig(), forking), RunConsole(workload, 0, quiet=False) as console:
        for note in found.notes:
            console.say("note", note)
        console.say("checkpoint", found.checkpoint.path)
        console.say("data", f"{data.name}: {len(test):,} test {workload.nouns}")
        tested = evaluate(workload, found.checkpoint, test, config.num_tasks)
        print_evaluation(console, workload, tested)
        return tested
