"""What a run survives: python benchmarks/chaos.py (make chaos)

Every run trains with two workers on a cluster of three raylets on this machine. At a random moment a worker is sent
SIGKILL, a node is removed (another comes), the driver is sent SIGKILL (and resumed), or the storage is taken away for
some seconds. A run counts as the same where its last weights are bit for bit those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray.cluster_utils import Cluster

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"
FLAGS = [
    *("--num-workers", "2", "--cpus-per-worker", "1", "--precision", "fp32", "--num-epochs", "2"),
    *("--batch-size", "250", "--checkpoint-every", "50", "--max-failures", "3"),
]
STEPS_PER_EPOCH = 220
RUNS = {"worker killed": 30, "node removed": 10, "driver killed": 10, "storage away": 5}
LATEST_S = 12.0  # after the workers have started; the training takes a little longer


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    kind: str
    moment_s: float
    status: int
    steps_repeated: int
    is_same: bool
    accuracy: float
    seconds: float
    last_line: str


class Driver:
    """A training job whose output is read as it comes."""

    def __init__(self, storage: Path, name: str, address: str, *more: str) -> None:
        self.lines: list[str] = []
        self.started = threading.Event()
        command = [sys.executable, "-u", str(TRAIN), *FLAGS, "--storage-path", str(storage), "--run-name", name, *more]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": address},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(("started", "test")):
                self.started.set()
        self.started.set()

    def wait(self) -> int:
        """Return the exit status, all output read."""
        status = self.process.wait()
        self._reader.join()
        return status


def kill_a_worker(cluster: Cluster, rng: random.Random) -> None:
    """Send SIGKILL to one of the training workers, which are children of the cluster's raylets."""
    raylets = [process.process.pid for node in cluster.worker_nodes for process in node.all_processes["raylet"]]
    found = subprocess.run(
        ["pgrep", "-P", ",".join(map(str, raylets)), "-f", "TrainWorker"], capture_output=True, text=True, check=False
    )
    pids = found.stdout.split()
    if pids:
        os.kill(int(rng.choice(pids)), 9)


def remove_a_node(cluster: Cluster, rng: random.Random) -> None:
    """Take a node away with all that runs on it; another one comes."""
    cluster.remove_node(rng.choice(list(cluster.worker_nodes)))
    cluster.add_node(num_cpus=1)


def take_storage_away(storage: Path, seconds: float) -> None:
    """Put a file in the place of the storage's folder for some seconds."""
    away = storage.with_name(storage.name + ".away")
    storage.rename(away)
    storage.touch()
    time.sleep(seconds)
    storage.unlink()
    away.rename(storage)


def weights(run: Path) -> str:
    """Return the digest of a run's last weights."""
    last = max(run.glob("checkpoint_epoch*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def steps_repeated(lines: list[str]) -> int:
    """Return the steps that a run's restarts have done again, as it says."""
    return sum(int(found[1].replace(",", "")) for line in lines if (found := re.search(r"lost \(([\d,]+) step", line)))


def run_once(
    kind: str, number: int, cluster: Cluster, folder: Path, rng: random.Random, expected: str | None
) -> Outcome:
    """Let one thing happen to one run."""
    storage, name = folder / f"{kind.replace(' ', '_')}_{number}", "run"
    storage.mkdir()
    start, moment = time.perf_counter(), rng.uniform(0, LATEST_S)
    driver = Driver(storage, name, cluster.address)
    driver.started.wait()
    time.sleep(moment)
    actions: dict[str, Callable[[], None]] = {
        "worker killed": lambda: kill_a_worker(cluster, rng),
        "node removed": lambda: remove_a_node(cluster, rng),
        "driver killed": driver.process.kill,
        "storage away": lambda: take_storage_away(storage, rng.uniform(2, 8)),
        "nothing": lambda: None,
    }
    actions[kind]()
    status, lines = driver.wait(), driver.lines
    if kind == "driver killed" and not (storage / name / "result.json").exists():
        driver = Driver(storage, name, cluster.address, "--resume")
        status, lines = driver.wait(), lines + driver.lines
    result = storage / name / "result.json"
    accuracy = json.loads(result.read_text())["test_accuracy"] if result.exists() else 0.0
    is_same = result.exists() and expected in (None, weights(storage / name))
    seconds = time.perf_counter() - start
    return Outcome(kind, moment, status, steps_repeated(lines), is_same, accuracy, seconds, lines[-1] if lines else "")


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--runs", type=int, help="of each kind, in place of the numbers that the table has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # Cluster, unlike `ray start`, never asks for a token
    rng = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            undisturbed = run_once("nothing", 0, cluster, folder, rng, None)
            print(f"undisturbed: accuracy {undisturbed.accuracy:.2%}, {undisturbed.seconds:.0f} s", flush=True)
            expected = weights(folder / "nothing_0" / "run")
            for kind in arguments.kinds:
                for number in range(arguments.runs or RUNS[kind]):
                    outcomes.append(run_once(kind, number, cluster, folder, rng, expected))
                    print(outcomes[-1], flush=True)
        finally:
            cluster.shutdown()
    print("\n| what happens | runs | finished | same weights | steps repeated, median and most | lowest accuracy |")
    print("|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        finished, same = sum(o.status == 0 for o in of_kind), sum(o.is_same for o in of_kind)
        repeated = sorted(o.steps_repeated for o in of_kind)
        lowest = min(o.accuracy for o in of_kind)
        steps = f"{repeated[len(repeated) // 2]}, {repeated[-1]} of {2 * STEPS_PER_EPOCH}"
        print(f"| {kind} | {len(of_kind)} | {finished} | {same} | {steps} | {lowest:.2%} |")


if __name__ == "__main__":
    main()
