"""How early a trial's rank can be trusted: python benchmarks/halving.py

Trains random configurations of the default search space, each with the schedule's full length. Validates each after
1/8, 1/4, 1/2, 3/4 and all of its steps: the weights, and their exponential moving average. A row for each part compares
the ranks there with the last ranks of the weights: Spearman's correlation, and how many of the last best three are in
the better half.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from scipy.stats import spearmanr

from mnist_ray.cluster.environment import keep_freed_memory
from mnist_ray.config import SweepConfig, TrainConfig
from mnist_ray.settings import build
from mnist_ray.sweep.space import Point, propose, space_of
from mnist_ray.training import engine
from mnist_ray.training.callback import Callback
from mnist_ray.training.metrics import score
from mnist_ray.training.state import Group, TrainingState
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import data_of
from mnist_ray.workload.splits import splits_of, subset

PARTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
EMA_STEPS = 1 / 50  # of all steps: the time in which an average forgets
BEST = 3


class Ranked(Callback):
    """Validates the weights and their average after each of ``PARTS``."""

    def __init__(self, workload: Workload, validation: Split, total: int) -> None:
        self._workload, self._validation = workload, validation
        self._due = [max(1, round(part * total)) for part in PARTS]
        self.scores: list[tuple[float, float]] = []

    def on_step(self, state: TrainingState) -> None:
        """Validate if enough steps are done."""
        if state.epoch * state.num_steps + state.step == self._due[len(self.scores)]:
            self.scores.append((self._score(state.model), self._score(state.result)))

    def _score(self, model: torch.nn.Module) -> float:
        return score(self._workload, engine.evaluate(self._workload, model, self._validation).values(self._workload))


def scores_of(reference: str, point: Point, schedule: str, limit: float) -> list[tuple[float, float]]:
    """Train one configuration on one thread; return the scores after each part: of the weights, and of the average."""
    torch.set_num_threads(1)
    keep_freed_memory()
    workload_class = loading.load(reference)
    given = {**workload_class().defaults, **point.values, "seed": point.seed, "schedule": schedule, "limit": limit}
    workload, config, group = workload_class(build(workload_class.Settings, given)), build(TrainConfig, given), Group()
    data = subset(splits_of(data_of(workload), None), config)
    total = config.num_epochs * config.num_steps(len(data.train))
    precision = engine.resolve_precision(config.precision, group)
    config = replace(config, precision=precision, ema_decay=max(0.0, 1 - 1 / (EMA_STEPS * total)))
    ranked = Ranked(workload, data.validation, total)
    state = engine.create_state(workload, config, len(data.train), group.device)
    engine.train(workload, state, data.train, config, group, [ranked])
    return ranked.scores


def rows(scores: Sequence[Sequence[tuple[float, float]]]) -> list[str]:
    """Return the table's rows from the scores of all configurations."""
    last = [each[-1][0] for each in scores]
    best = sorted(range(len(last)), key=lambda trial: -last[trial])[:BEST]
    table = []
    for number, part in enumerate(PARTS):
        cells = []
        for kind in (0, 1):
            here = [each[number][kind] for each in scores]
            better = sorted(range(len(here)), key=lambda trial: -here[trial])[: (len(here) + 1) // 2]
            found = len({*best} & {*better})
            cells.append(f"{spearmanr(here, last).statistic:.2f}, {found} of {BEST}")
        table.append(f"| {part:g} | {' | '.join(cells)} |")
    return table


def main() -> None:
    """Train all configurations with each schedule, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default=loading.DEFAULT, help="such as examples/shapes.py")
    parser.add_argument("--schedules", nargs="+", default=["one-cycle", "constant"])
    parser.add_argument("--num-trials", type=int, default=32)
    parser.add_argument("--limit", type=float, default=1.0, help="fraction of the data")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    points = propose(space_of(loading.load(args.workload), {}), SweepConfig(num_trials=args.num_trials), seed=0)
    for schedule in args.schedules:
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            trained = [pool.submit(scores_of, args.workload, point, schedule, args.limit) for point in points]
            scores = [future.result() for future in trained]
        print(f"\n{args.workload}, {schedule}, {len(points)} configurations\n")
        print("| part of the steps | by the weights | by their average |\n|---|---|---|")
        print("\n".join(rows(scores)), flush=True)


if __name__ == "__main__":
    main()
