"""Check that a sweep survives kills.

    python benchmarks/sweep_kills.py     # 20 minutes on two cores

Guards the choice of a sweep: if it loses its driver, a trial or a node, it chooses what an undisturbed sweep chooses,
and trains no reported epoch again.

Each sweep has eight trials by halving, two at a time, on a cluster of a head and two nodes on this machine. At a random
moment, its driver is killed and the sweep resumed, a trial's process is killed, or a node is removed and replaced. A
sweep counts as the same if it ends with the best.json of an undisturbed one, the same weights, and the same values for
each trial. `repeated` counts the trials that were trained again from before an epoch that members.csv had at the kill.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from chaos import Raylets, replace_a_node

TUNE = Path(__file__).parent.parent / "jobs" / "tune.py"
FLAGS = [
    *("--limit", "0.25", "--num-trials", "8", "--num-confirmed", "2", "--sweep", "learning_rate=log:5e-4:2e-2"),
    *("--num-workers", "1", "--cpus-per-worker", "1", "--precision", "fp32"),
]
RUNS = {"driver killed": 8, "trial killed": 6, "node removed": 6}
STARTS = """\
import json, os, time
import torch
from mnist_ray.training.callback import Callback

class Starts(Callback):
    def on_start(self, state, group):
        trial = [state.optimizer.param_groups[0]["max_lr"], torch.initial_seed()]
        with open(os.path.join(os.path.dirname(__file__), "starts"), "a") as file:
            file.write(json.dumps([time.time(), *trial, state.total_step / state.steps_per_epoch]) + "\\n")
"""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one sweep."""

    kind: str
    moment_s: float
    status: int
    is_same: bool
    repeated: int
    seconds: float


class Sweep:
    """A sweep in a folder of its own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self._address = folder, address
        folder.mkdir()
        (folder / "starts.py").write_text(STARTS)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """Start the job."""
        where = ["--storage-path", str(self.folder), "--run-name", "run", "--callback", str(self.folder / "starts.py")]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-u", str(TUNE), *FLAGS, *where, *more],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": self._address},
            )

    def reports(self) -> dict[tuple[float, int], str]:
        """Return what members.csv has of each trial: `EPOCHS:MONITOR` for each report."""
        file = self.folder / "run" / "members.csv"
        rows = csv.DictReader(file.read_text().splitlines() if file.exists() else [])
        return {(float(row["learning_rate"]), int(row["seed"])): row["reports"] for row in rows}

    def choice(self) -> object:
        """Return best.json, apart from the callback's path, the weights' digest, and the reports of all trials."""
        best, result = (self.folder / "run" / name for name in ("best.json", "result.json"))
        if not result.exists():
            return None
        weights = json.loads(result.read_text())["weights_sha256"]
        return {**json.loads(best.read_text()), "callback": ""}, weights, self.reports()

    def repeated(self, since: float, noted: dict[tuple[float, int], str]) -> int:
        """Count the trainings that started after a moment, from before an epoch that had been noted."""
        starts = [json.loads(line) for line in (self.folder / "starts").read_text().splitlines()]
        reached = {trial: float(reports.split()[-1].split(":")[0]) for trial, reports in noted.items() if reports}
        return sum(at < reached.get((rate, seed), 0) for when, rate, seed, at in starts if when > since)


def run_once(kind: str, moment_s: float, sweep: Sweep, nodes: Raylets, rng: random.Random, expected: object) -> Outcome:
    """Run a sweep, and disturb it once."""
    begin = time.monotonic()
    job = sweep.start()
    while not sweep.reports() and job.poll() is None:
        time.sleep(0.1)
    time.sleep(moment_s)
    since, noted = time.time(), sweep.reports()
    if kind == "driver killed":
        job.kill()
        job.wait()
        job = sweep.start("--resume")
    elif kind == "trial killed":
        for pid in nodes.training_pids("ray::Implicit")[:1]:  # none between two trials
            os.kill(pid, signal.SIGKILL)
    elif kind == "node removed":
        replace_a_node(nodes, rng)
    status = job.wait()
    is_same = expected is None or sweep.choice() == expected
    return Outcome(kind, moment_s, status, is_same, sweep.repeated(since, noted), time.monotonic() - begin)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, help="runs of each kind")
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # Cluster, unlike `ray start`, does not set up a token
    rng, nodes, outcomes = random.Random(arguments.seed), Raylets(), list[Outcome]()
    try:
        for _ in range(2):
            nodes.add_node()
        with tempfile.TemporaryDirectory() as folder:
            whole = Sweep(Path(folder) / "whole", nodes.address)
            undisturbed = run_once("nothing", 0.0, whole, nodes, rng, None)
            print(undisturbed, flush=True)
            for kind, number in RUNS.items():
                for each in range(arguments.runs or number):
                    sweep = Sweep(Path(folder) / f"{kind} {each}", nodes.address)
                    moment_s = rng.uniform(0, undisturbed.seconds - 10)
                    outcomes.append(run_once(kind, moment_s, sweep, nodes, rng, whole.choice()))
                    print(outcomes[-1], flush=True)
                    if not outcomes[-1].is_same or outcomes[-1].status:
                        print((sweep.folder / "output").read_text(), whole.choice(), sweep.choice(), flush=True)
    finally:
        nodes.shutdown()
    print("\n| failure | sweeps | finished | same choice and values | epochs repeated |\n|---|---|---|---|---|")
    for kind in RUNS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        same, repeated = sum(o.is_same for o in of_kind), sum(o.repeated for o in of_kind)
        print(f"| {kind} | {len(of_kind)} | {sum(o.status == 0 for o in of_kind)} | {same} | {repeated} |")


if __name__ == "__main__":
    main()
