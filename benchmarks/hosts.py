"""Simulated hosts, for chaos.py and bits.py: network namespaces joined by a bridge, each with an address.

Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

NETWORK = "10.98.0"
PORT = 6379
BRIDGE = "mnistray0"
SILENCE_S = 60.0
# Gives a host its own /dev/shm, in the mount namespace that `ip netns exec` has created.
OWN_MEMORY = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]


def can_be_made() -> bool:
    """Return whether this process may create network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and _try("ip", "netns", "list")


class Hosts:
    """A head without CPUs, and nodes with one CPU from ``add_node``. The driver runs on the head's host."""

    def __init__(self) -> None:
        self.address = f"{NETWORK}.1:{PORT}"
        self.driver_prefix = ["ip", "netns", "exec", f"{BRIDGE}-1"]
        self._temporary = tempfile.mkdtemp(prefix="hosts-")
        self._nodes: dict[int, psutil.Popen] = {}
        self._added = 0
        _remove_orphans()
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "up")
        self._start("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")

    def add_node(self) -> None:
        """Start a host with one CPU."""
        self._start(f"--address={self.address}", "--num-cpus=1")

    def remove_a_node(self, rng: random.Random) -> None:
        """Kill a random host and all its processes; the others are not notified."""
        self._remove(rng.choice(self.worker_numbers))

    def revive(self) -> None:
        """Replace hosts whose Ray has exited. It does so when it learns that the head has given it up."""
        for number in self.worker_numbers:
            if self._nodes[number].poll() is not None:
                self._remove(number)
                self.add_node()

    def _start(self, *flags: str) -> None:
        self._added += 1
        number = self._added
        name, link = f"{BRIDGE}-{number}", f"mrlink{number}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", link, "master", BRIDGE, "up")
        inside = ["ip", "netns", "exec", name]
        _run(*inside, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run(*inside, "ip", "link", "set", interface, "up")
        where = [f"--node-ip-address={NETWORK}.{number}", "--disable-usage-stats", "--block"]
        if number == 1:
            where.append(f"--temp-dir={self._temporary}")
        log = Path(self._temporary) / f"host-{number}.log"
        with log.open("w") as file:
            self._nodes[number] = psutil.Popen(
                [*inside, *OWN_MEMORY, sys.executable, "-m", "ray.scripts.scripts", "start", *where, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + SILENCE_S
        while "will now block" not in log.read_text():
            if time.monotonic() > deadline or self._nodes[number].poll() is not None:
                raise RuntimeError(f"host {number} does not start: {log.read_text()}")
            time.sleep(0.1)

    @property
    def worker_numbers(self) -> list[int]:
        """The numbers of all hosts but the head."""
        return sorted(self._nodes.keys() - {1})

    def training_pids(self) -> list[int]:
        """Return the PIDs of the training workers on all hosts."""
        return training_pids([self._nodes[number].pid for number in self.worker_numbers])

    def cut(self, number: int, seconds: float) -> None:
        """Take a host off the network for ``seconds``."""
        _run("ip", "link", "set", f"mrlink{number}", "down")
        time.sleep(seconds)
        _run("ip", "link", "set", f"mrlink{number}", "up")

    def _remove(self, number: int) -> None:
        _try("ip", "link", "del", f"mrlink{number}")
        node = self._nodes.pop(number)
        family = family_of(node)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=SILENCE_S)
        _try("ip", "netns", "del", f"{BRIDGE}-{number}")

    def shutdown(self) -> None:
        """Kill all hosts and remove their network."""
        for number in list(self._nodes):
            self._remove(number)
        _try("ip", "link", "del", BRIDGE)
        shutil.rmtree(self._temporary, ignore_errors=True)


def training_pids(nodes: Sequence[int], name: str = "TrainWo") -> list[int]:
    """Return the PIDs of the training workers on some nodes, given by the PID of each raylet or its parent."""
    found = []
    for pid in nodes:
        for process in family_of(psutil.Process(pid)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just exited
                if name in process.name():
                    found.append(process.pid)
    return found


def family_of(node: psutil.Process) -> list[psutil.Process]:
    """Return a node's processes: ``node``, its descendants, and the workers that a fork server has forked for it."""
    if not node.is_running():
        return []
    below = [node, *node.children(recursive=True)]
    pids = {str(process.pid) for process in below}
    forked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(process.pid) not in pids and process.environ().get("RAY_RAYLET_PID") in pids:
                forked.append(process)
    return [*below, *forked]


def _remove_orphans() -> None:
    """Remove the network that a killed benchmark has left behind."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
    for name in listed:
        if name.startswith(f"{BRIDGE}-"):
            _try("ip", "netns", "del", name)
    _try("ip", "link", "del", BRIDGE)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _try(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
