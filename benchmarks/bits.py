"""Check that a run with ``--reproducible`` gives the same bits on any number of workers.

    python benchmarks/bits.py                       # half an hour on two cores; the hosts need root and iproute2

Guards the same bits on any number of workers.

Trains the same run with ``--reproducible`` on several numbers of workers, through shared memory, through gloo on
separate hosts, with workers killed, on a cluster that shrinks and grows, and resumed with fewer workers. Prints a row
for each case: how many of its runs ended with weights bit-identical to those of one worker.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import chaos
from chaos import Driver, Raylets
from hosts import Hosts, can_be_made

EXAMPLE = Path(__file__).parent.parent / "examples" / "shapes.py"
RECIPES: dict[str, list[str]] = {
    "default recipe": [],
    "notebook recipe, one epoch": ["--recipe", "notebook", "--num-epochs", "1"],
    "shapes.py, one epoch": ["--workload", str(EXAMPLE), "--num-epochs", "1"],
}
NUM_KILLS = 10


class Local:
    """This machine, on which each job starts a local Ray."""

    address, driver_prefix = "local", []  # type: ignore[var-annotated]

    def revive(self) -> None:
        """Do nothing: there are no nodes to replace."""


def run(nodes: Local | Raylets | Hosts, folder: Path, *flags: str, do: Callable[[Driver], object] | None = None) -> str:
    """Train; return the digest of the last weights. ``do`` is called as soon as the workers train."""
    storage = Path(tempfile.mkdtemp(dir=folder))
    driver = Driver(storage, "run", nodes, *flags)
    if do is not None:
        while not driver.started.wait(0.2):
            nodes.revive()
        do(driver)
    status = driver.wait(nodes)
    if status == -signal.SIGKILL and not (storage / "run" / "result.json").exists():  # resume with one worker
        driver = Driver(storage, "run", nodes, "--resume", "--num-workers", "1")
        status = driver.wait(nodes)
    if status:
        raise RuntimeError("\n".join(driver.lines[-5:]))
    return chaos.weights(storage / "run")


def later(rng: random.Random, action: Callable[[], object]) -> Callable[[Driver], None]:
    """Return a function that calls ``action`` at a random moment of a run."""

    def act(driver: Driver) -> None:
        time.sleep(rng.uniform(0.2, 8))
        action()

    return act


def shrink_and_grow(nodes: Raylets) -> Callable[[Driver], None]:
    """Return a function that removes a node, and adds one as soon as the run has restarted without it."""

    def act(driver: Driver) -> None:
        time.sleep(3)
        nodes.remove_a_node(random.Random(0))
        for number in (1, 2):
            line = f"restarted  {number} ×"
            while driver.process.poll() is None and not any(seen.startswith(line) for seen in driver.lines):
                time.sleep(0.2)
            if number == 1:
                nodes.add_node()

    return act


@contextlib.contextmanager
def started(start: Callable[[], Raylets | Hosts], num_nodes: int) -> Iterator[Raylets | Hosts]:
    """Start a cluster with ``num_nodes`` nodes for workers; shut it down afterwards."""
    nodes = start()
    try:
        for _ in range(num_nodes):
            nodes.add_node()
        yield nodes
    finally:
        nodes.shutdown()


def rows(folder: Path, rng: random.Random) -> Iterator[tuple[str, str, Sequence[bool]]]:
    """Yield each case, its flags, and for each of its runs whether the weights equal those of one worker."""
    local, expected = Local(), {}
    for recipe, flags in RECIPES.items():
        expected[recipe] = run(local, folder, "--num-workers", "1", *flags)
        print(f"{recipe}: {expected[recipe]}", flush=True)
        for number in (2, 3, 4):
            same = run(local, folder, "--num-workers", str(number), *flags) == expected[recipe]
            yield f"{recipe}, shared memory", f"--num-workers {number}", [same]
    wanted = expected["default recipe"]
    with started(Raylets, 2) as nodes:
        kill = later(rng, lambda: chaos.kill_a_worker(nodes, rng))
        runs = [run(nodes, folder, "--num-workers", "2", do=kill) == wanted for _ in range(NUM_KILLS)]
        yield "a worker killed at a random moment", "--num-workers 2", runs
        assert isinstance(nodes, Raylets)
        elastic = run(
            nodes,
            folder,
            "--num-workers",
            "2",
            "--set",
            "min_workers=1",
            "--num-epochs",
            "2",
            do=shrink_and_grow(nodes),
        )
        yield "2 workers, then 1, then 2", "--num-workers 2 --set min_workers=1", [elastic == wanted]

    def kill_driver(driver: Driver) -> None:
        time.sleep(rng.uniform(2, 5))
        driver.process.kill()

    resumed = run(local, folder, "--num-workers", "3", do=kill_driver)
    yield "driver killed, resumed with 1 worker", "--num-workers 3", [resumed == wanted]
    if can_be_made():
        with started(Hosts, 2) as nodes:
            yield "two hosts, gloo", "--num-workers 2", [run(nodes, folder, "--num-workers", "2") == wanted]


def main() -> None:
    """Run everything and print the table."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # Cluster, unlike `ray start`, does not set up a token
    chaos.FLAGS[:] = ["--reproducible", "--checkpoint-every", "50", "--max-failures", "3"]
    print("| case | flags | runs | bit-identical |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what, flags, same in rows(Path(folder), random.Random(0)):
            print(f"| {what} | `{flags}` | {len(same)} | {sum(same)} |", flush=True)


if __name__ == "__main__":
    main()
