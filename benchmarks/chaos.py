"""Check which failures a run survives.

    python benchmarks/chaos.py                                      # make chaos: an hour on two cores
    python benchmarks/chaos.py --nodes drained --runs 1             # 7 minutes

Guards resuming: a run that loses a worker, a node, its driver, a link or its storage ends with the weights of an
undisturbed run, bit for bit.

Each run trains with two workers on a cluster of a head and two nodes on this machine. At a random moment a worker is
killed (SIGKILL), a node is removed and replaced, the driver is killed and the run resumed, or the storage disappears
for some seconds. With root and iproute2, there are also runs on nodes in network namespaces, each with its own address.
In some of these, a node's link is cut and restored after some seconds, or so late that Ray has given the node up. A run
counts as the same if its last weights are bit-identical to those of an undisturbed run.

With ``--nodes drained``, both nodes are announced to be preempted, one after the other, and removed at their deadlines.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosts import Hosts, can_be_made, training_pids
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"
FLAGS = [
    *("--num-workers", "2", "--cpus-per-worker", "1", "--precision", "fp32", "--num-epochs", "2"),
    *("--batch-size", "250", "--checkpoint-every", "50", "--max-failures", "3"),
]
STEPS_PER_EPOCH = 220
RUNS = {"worker killed": 30, "node removed": 10, "driver killed": 10, "storage away": 5}
RUNS_ON_HOSTS = {"worker killed": 3, "node removed": 3, "driver killed": 3, "link cut": 6}
DEADLINES_S = {"deadline 5 s": 5, "deadline 30 s": 30, "deadline 120 s": 120}
RUNS_DRAINED = dict.fromkeys(DEADLINES_S, 2)
DRAINED_FLAGS = ["--num-epochs", "1", "--batch-size", "125", "--checkpoint-every", "1000000"]  # as many steps
SLOW = """\
import os, time
from mnist_ray.training.callback import Callback

class Slow(Callback):
    def on_step(self, state):
        if not os.path.exists({gate!r}):
            time.sleep(0.5)
"""
MAX_CUT_S = 40.0  # Ray gives a node up after about 20 s of silence
LATEST_S = 12.0  # after the workers have started; the training takes a little longer


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run."""

    where: str
    kind: str
    moment_s: float
    status: int
    steps_repeated: int
    is_same: bool
    accuracy: float
    seconds: float
    last_line: str


class Driver:
    """A training job, whose output is read while it runs."""

    def __init__(self, storage: Path, name: str, nodes: Raylets | Hosts, *more: str) -> None:
        self.lines: list[str] = []
        self.started = threading.Event()
        where = ["--storage-path", str(storage), "--run-name", name]
        command = [*nodes.driver_prefix, sys.executable, "-u", str(TRAIN), *FLAGS, *where, *more]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": nodes.address},
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

    def wait(self, nodes: Raylets | Hosts) -> int:
        """Wait for the exit and return its status; meanwhile replace nodes that Ray has given up."""
        while self.process.poll() is None:
            nodes.revive()
            time.sleep(0.2)
        self._reader.join()
        return self.process.returncode


class Raylets:
    """Nodes that share this machine's address: a head without CPUs, and nodes from ``add_node``."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        self.driver_prefix: list[str] = []

    def add_node(self) -> None:
        """Start a node with one CPU."""
        self._cluster.add_node(num_cpus=1)

    def training_pids(self, name: str = "TrainWo") -> list[int]:
        """Return the PIDs of the training workers, or of processes with another name, on all nodes."""
        nodes = self._cluster.worker_nodes
        return training_pids([started.process.pid for node in nodes for started in node.all_processes["raylet"]], name)

    def remove_a_node(self, rng: random.Random) -> None:
        """Remove a random node and all its processes."""
        self._cluster.remove_node(rng.choice(list(self._cluster.worker_nodes)))

    def drain_all(self, deadline_s: float) -> None:
        """Preempt both nodes, the second after half the time. A new node comes with each announcement."""
        nodes = list(self._cluster.worker_nodes)
        for node in nodes:
            reason, until_s = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), time.time() + deadline_s
            GcsClient(address=self.address).drain_node(node.node_id, reason, "spot", int(1000 * until_s))
            self.add_node()
            time.sleep(max(0, until_s - deadline_s / 2 - time.time()))
        for node in nodes:
            self._cluster.remove_node(node, allow_graceful=False)
            time.sleep(deadline_s / 2)

    def revive(self) -> None:
        """Do nothing: these nodes do not exit by themselves."""

    def shutdown(self) -> None:
        """Shut down all nodes."""
        self._cluster.shutdown()


def kill_a_worker(nodes: Raylets | Hosts, rng: random.Random) -> None:
    """Send SIGKILL to a random training worker, unless all have exited."""
    if pids := nodes.training_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)


def replace_a_node(nodes: Raylets | Hosts, rng: random.Random) -> None:
    """Remove a random node and add a new one."""
    nodes.remove_a_node(rng)
    nodes.add_node()


def take_storage_away(storage: Path, seconds: float) -> None:
    """Replace the storage folder by a file for ``seconds``."""
    away = storage.with_name(storage.name + ".away")
    storage.rename(away)
    storage.touch()
    time.sleep(seconds)
    storage.unlink()
    away.rename(storage)


def weights(run: Path) -> str:
    """Return the SHA-256 of a run's last weights."""
    last = max(run.glob("checkpoint_epoch*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(last.glob("model*")))).hexdigest()


def steps_repeated(lines: list[str]) -> int:
    """Return the number of steps that a run's restarts repeated, according to its output."""
    return sum(int(found[1].replace(",", "")) for line in lines if (found := re.search(r"lost \(([\d,]+) step", line)))


def run_once(
    where: str, kind: str, number: int, nodes: Raylets | Hosts, folder: Path, rng: random.Random, expected: str | None
) -> Outcome:
    """Train one run and disturb it once."""
    storage, name = folder / f"{where}_{kind}_{number}".replace(" ", "_"), "run"
    storage.mkdir()
    start, moment = time.perf_counter(), rng.uniform(0, LATEST_S)
    more: list[str] = []
    if where == "drained":  # steps are slow until the nodes are gone
        (storage / "slow.py").write_text(SLOW.format(gate=str(storage / "fast")))
        more = [*DRAINED_FLAGS, "--callback", str(storage / "slow.py")]
        if kind == "nothing":
            (storage / "fast").touch()
    driver = Driver(storage, name, nodes, *more)
    while not driver.started.wait(0.2):
        nodes.revive()
    time.sleep(moment)
    actions: dict[str, Callable[[], None]] = {
        "worker killed": lambda: kill_a_worker(nodes, rng),
        "node removed": lambda: replace_a_node(nodes, rng),
        "driver killed": driver.process.kill,
        "storage away": lambda: take_storage_away(storage, rng.uniform(2, 8)),
        "nothing": lambda: None,
    }
    if isinstance(nodes, Hosts):
        actions["link cut"] = lambda: nodes.cut(rng.choice(nodes.worker_numbers), rng.uniform(1, MAX_CUT_S))
    else:
        actions |= {deadline: functools.partial(nodes.drain_all, s) for deadline, s in DEADLINES_S.items()}
    if any(re.match(r"epoch (\d+)/\1 +finished", line) for line in driver.lines):
        kind = f"{kind}, but too late"  # a row of its own: nothing is left to disturb
    else:
        actions[kind]()
    (storage / "fast").touch()
    status, lines = driver.wait(nodes), driver.lines
    if kind == "driver killed" and not (storage / name / "result.json").exists():
        driver = Driver(storage, name, nodes, "--resume")
        status, lines = driver.wait(nodes), lines + driver.lines
    result = storage / name / "result.json"
    accuracy = json.loads(result.read_text())["test_accuracy"] if result.exists() else 0.0
    is_same = result.exists() and expected in (None, weights(storage / name))
    seconds = time.perf_counter() - start
    last_line = lines[-1] if lines else ""
    return Outcome(where, kind, moment, status, steps_repeated(lines), is_same, accuracy, seconds, last_line)


def run_all(
    where: str, start: Callable[[], Raylets | Hosts], runs: Mapping[str, int], folder: Path, rng: random.Random
) -> list[Outcome]:
    """Do all ``runs`` of each kind on one cluster; return their outcomes."""
    outcomes: list[Outcome] = []
    nodes = start()
    try:
        for _ in range(2):
            nodes.add_node()
        undisturbed = run_once(where, "nothing", 0, nodes, folder, rng, None)
        print(f"{where}, undisturbed: accuracy {undisturbed.accuracy:.2%}, {undisturbed.seconds:.0f} s", flush=True)
        expected = weights(folder / f"{where}_nothing_0" / "run")
        for kind, number_of_runs in runs.items():
            for number in range(number_of_runs):
                outcomes.append(run_once(where, kind, number, nodes, folder, rng, expected))
                print(outcomes[-1], flush=True)
    finally:
        nodes.shutdown()
    return outcomes


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print a row for each kind of failure."""
    print("\n| nodes | failure | runs | finished | same weights | repeated steps: median, maximum | lowest accuracy |")
    print("|---|---|---|---|---|---|---|")
    for where, kind in dict.fromkeys((outcome.where, outcome.kind) for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if (outcome.where, outcome.kind) == (where, kind)]
        finished, same = sum(o.status == 0 for o in of_kind), sum(o.is_same for o in of_kind)
        repeated = sorted(o.steps_repeated for o in of_kind)
        steps = f"{repeated[len(repeated) // 2]}, {repeated[-1]} of {2 * STEPS_PER_EPOCH}"
        if kind == "driver killed":  # the resumed job does not know how far the killed one was
            steps = "unknown"
        lowest = min(o.accuracy for o in of_kind)
        print(f"| {where} | {kind} | {len(of_kind)} | {finished} | {same} | {steps} | {lowest:.2%} |")


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices={**RUNS, **RUNS_ON_HOSTS, **RUNS_DRAINED})
    parser.add_argument("--nodes", nargs="+", choices=["raylets", "hosts", "drained"], default=["raylets", "hosts"])
    parser.add_argument("--runs", type=int, help="runs of each kind (default: those of benchmarks/measured.md)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="passed to the job")
    parser.add_argument("--fork-workers", choices=["auto", "no"], default="auto", help="passed to the job")
    parser.add_argument("--plain-ray", action="store_true", help="passed to the job")
    arguments = parser.parse_args()
    FLAGS.extend(["--set", f"fork_workers={arguments.fork_workers}", "--strategy", arguments.strategy])
    FLAGS.extend(["--plain-ray"] if arguments.plain_ray else [])
    os.environ["RAY_AUTH_MODE"] = "disabled"  # Cluster, unlike `ray start`, does not set up a token
    rng = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        groups = (("raylets", Raylets, RUNS), ("hosts", Hosts, RUNS_ON_HOSTS), ("drained", Raylets, RUNS_DRAINED))
        for where, start, runs in groups:
            kinds = arguments.kinds or runs
            chosen = {kind: arguments.runs or number for kind, number in runs.items() if kind in kinds}
            if where not in arguments.nodes or (where == "hosts" and not can_be_made()):
                print(f"{where}: skipped")
                continue
            outcomes += run_all(where, start, chosen, Path(folder), rng)
    print_table(outcomes)


if __name__ == "__main__":
    main()
