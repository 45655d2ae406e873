"""Measure jobs of several runs: their time, their intervals, and what kills cost.

    python benchmarks/several.py --parts time --rounds 3    # 15 minutes on two cores
    python benchmarks/several.py --parts folds              # 1 minute
    python benchmarks/several.py --parts interval           # 5 minutes
    python benchmarks/several.py --parts kills --rounds 10  # 10 minutes

``time``: a cross-validation beside its runs one after the other, each with the default workers, on MNIST and on a table
of 20,000 rows. ``folds``: its accuracy on the breast cancer data beside a loop over scikit-learn's folds in plain
PyTorch. ``interval``: how often the interval of five seeds contains the mean of 200, over 40 jobs of five seeds.
``kills``: jobs whose driver is killed at random moments and resumed, compared with an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from before import ROOT

from mnist_ray.report.intervals import mean_interval

TABLE = '''
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Table(Classification):
    """Rows of 20 numbers; a class depends on them in a nonlinear way."""

    noun = "row"
    recipes = {"default": {"num_epochs": 5, "batch_size": 64, "learning_rate": 3e-3}}
    num_rows = 20_000

    def load_data(self):
        random = np.random.default_rng(0)
        rows = random.normal(size=(self.num_rows + 2000, 20)).astype(np.float32)
        noise = 0.5 * random.normal(size=len(rows))
        classes = (np.sin(rows[:, 0]) + rows[:, 1] * rows[:, 2] + noise > 0).astype(np.uint8)
        return Data(Arrays(rows[:-2000], classes[:-2000]), Arrays(rows[-2000:], classes[-2000:]))

    def create_model(self):
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

class Small(Table):
    """A table of 500 rows, which trains in a moment."""

    recipes = {"default": {"num_epochs": 4, "batch_size": 32, "learning_rate": 3e-3}}
    num_rows = 500
'''

CANCER = '''
from sklearn.datasets import load_breast_cancer
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Cancer(Classification):
    """All examples are training data; a few stand in for the test set, which a cross-validation does not use."""

    recipes = {"default": {"num_epochs": 20, "batch_size": 32, "learning_rate": 1e-3, "validation_size": 0}}

    def load_data(self):
        inputs, targets = load_breast_cancer(return_X_y=True)
        inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).astype("float32")
        return Data(Arrays(inputs, targets), Arrays(inputs[:9], targets[:9]))

    def create_model(self):
        return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
'''


def job(*flags: str) -> list[str]:
    """Return the command of a training."""
    return [sys.executable, str(ROOT / "jobs" / "train.py"), *flags]


def seconds_of(*flags: str) -> float:
    """Run a training; return its time from start to exit."""
    begun = time.monotonic()
    subprocess.run(job(*flags), check=True, capture_output=True, env={**os.environ, "RAY_ADDRESS": "local"})
    return time.monotonic() - begun


def result_of(run: Path) -> dict[str, Any]:
    """Return a run's result."""
    return dict(json.loads((run / "result.json").read_text()))


def measure_time(folder: Path, rounds: int) -> None:
    """Print the seconds of a cross-validation, and of its runs one after the other."""
    for name, workload in (("MNIST", []), ("table", ["--workload", f"{folder / 'table.py'}:Table"])):
        ratios = []
        for number in range(rounds):
            common = [*workload, "--folds", "5", "--storage-path", str(folder / f"{name}{number}")]
            together = seconds_of(*common)
            apart = sum(seconds_of(*common, "--set", f"fold={fold}") for fold in range(1, 6))
            ratios.append(together / apart)
            print(f"{name}: {together:.1f} s, one after the other {apart:.1f} s: {ratios[-1]:.2f}", flush=True)
        print(f"{name}: median {statistics.median(ratios):.2f} of {rounds}")


def measure_folds(folder: Path, rounds: int) -> None:
    """Print the accuracy of a cross-validation, and of a loop over scikit-learn's folds."""
    seconds_of(
        "--workload", str(folder / "cancer.py"), "--folds", "5", "--storage-path", str(folder), "--run-name", "cv"
    )
    result = result_of(folder / "cv")
    low, high = result["spread"]["test_accuracy"]["interval"]
    loop = [accuracy_of_loop(seed) for seed in range(rounds)]
    print(f"cross-validation: {result['test_accuracy']:.2%} (95 %: {low:.2%} to {high:.2%})")
    print(f"loop, by seed: {', '.join(f'{accuracy:.2%}' for accuracy in loop)}")


def accuracy_of_loop(seed: int) -> float:
    """Return the mean accuracy over five folds of a loop in plain PyTorch, with the settings of ``Cancer``."""
    import torch
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import StratifiedKFold
    from torch import nn

    torch.manual_seed(seed)
    values, classes = load_breast_cancer(return_X_y=True)
    inputs, targets = torch.tensor((values - values.mean(0)) / values.std(0)).float(), torch.tensor(classes)
    accuracies = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(values, classes):
        model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(20):
            for batch in torch.tensor(train)[torch.randperm(len(train))].split(32):
                loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            accuracies.append((model(inputs[test]).argmax(1) == targets[test]).double().mean().item())
    return statistics.mean(accuracies)


def measure_interval(folder: Path, rounds: int) -> None:
    """Print how often the interval of five seeds contains the mean of 200; a job of 200 has the runs of 40 jobs."""
    small = ["--workload", f"{folder / 'table.py'}:Small", "--storage-path", str(folder), "--run-name", "seeds"]
    print(f"200 seeds: {seconds_of(*small, '--num-seeds', '200'):.0f} s")
    for name, spread in result_of(folder / "seeds")["spread"].items():
        values, hits = spread["values"], 0
        for start in range(0, 200, 5):
            low, high = mean_interval(values[start : start + 5])
            hits += low <= statistics.mean(values) <= high
        print(f"{name}: mean {statistics.mean(values):.4f}, in {hits} of 40 intervals ({hits / 40:.0%})")


def measure_kills(folder: Path, rounds: int) -> None:
    """Print whether jobs that are killed have the figures of an undisturbed one. Exits with 1 if one differs."""
    common = [
        "--workload",
        f"{folder / 'table.py'}:Table",
        "--folds",
        "3",
        "--num-seeds",
        "2",
        "--storage-path",
        str(folder),
    ]
    length = seconds_of(*common, "--run-name", "undisturbed")
    expected, num_kills = comparable(folder / "undisturbed"), 0
    for number in range(rounds):
        begin, is_done = ["--run-name", f"killed{number}", "--resume", "auto"], False
        while not is_done:
            process = subprocess.Popen(job(*common, *begin), stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                is_done = process.wait(random.uniform(2, 1.2 * length)) == 0
                assert is_done, "the job has failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                num_kills += 1
        if comparable(folder / f"killed{number}") != expected:
            sys.exit(f"killed{number} differs from the undisturbed job: see {folder}")
        shutil.rmtree(folder / f"killed{number}")
    print(f"{rounds} jobs with {num_kills} kills: all have the weights, figures and predictions of an undisturbed one")


def comparable(run: Path) -> Any:
    """Return what must not depend on kills: figures, predictions, and each member's weights."""
    result = result_of(run)
    weights = [result_of(run / member)["weights_sha256"] for member in result["members"]]
    return result["spread"], result["checkpoint"], (run / "predictions.parquet").read_bytes(), weights


PARTS: dict[str, Callable[[Path, int], None]] = {
    "time": measure_time,
    "folds": measure_folds,
    "interval": measure_interval,
    "kills": measure_kills,
}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "table.py").write_text(TABLE)
        (folder / "cancer.py").write_text(CANCER)
        for part in args.parts:
            PARTS[part](folder, args.rounds)


if __name__ == "__main__":
    main()
