"""Predict the speed of training on many workers from a few constants: python benchmarks/scaling.py

Measures on this machine the seconds of a step of one worker, of a sum over workers through shared memory and through a
network link, and the slowdown if there are more workers than cores. From these constants it predicts the step of 1, 2
and 4 workers at several batch sizes, and of two hosts with a slow link (network namespaces; needs root and iproute2).
Then it measures the same steps. All measurements take turns, in several rounds, since the machine's speed varies.
Finally it prints predictions for up to 1,000 workers, for the default recipe's network and for one of 100 million
parameters. --quick measures few steps, to see that everything works.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from hosts import OWN_MEMORY
from loop import timed_steps
from torch import nn

from mnist_ray.config import TrainConfig
from mnist_ray.training.state import Group
from mnist_ray.workload import loading
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import data_of

HOSTS = ("mnistray-a", "mnistray-b")
ADDRESSES = ("10.97.0.1", "10.97.0.2")
PORT = 29_411
TOLERANCE = 0.15


@dataclass(frozen=True)
class Link:
    """A network link between two hosts."""

    megabit_s: float
    delay_s: float = 0.0
    """One way."""

    @property
    def bytes_per_s(self) -> float:
        """Payload; headers take 5 %."""
        return self.megabit_s * 1e6 / 8 * 0.95


@dataclass(frozen=True)
class Model:
    """The training cost of a model on one worker with one core."""

    num_bytes: float
    """Size of the gradients."""
    slices: tuple[int, ...]
    """Sizes, in images, for which a step was measured."""
    seconds: tuple[float, ...]
    """Of a step of each size. An image costs more if the slice does not fit into the processor's cache."""

    def compute_s(self, size: int) -> float:
        """Return the seconds of a step of ``size`` images, on a line through the two nearest measured sizes."""
        place = min(max(bisect.bisect(self.slices, size), 1), len(self.slices) - 1)
        (low, high), (before, after) = self.slices[place - 1 : place + 1], self.seconds[place - 1 : place + 1]
        return max(0.0, before + (after - before) * (size - low) / (high - low))


@dataclass(frozen=True)
class Plan:
    """A run on several workers."""

    num_workers: int
    num_hosts: int = 1
    cores: int = 2
    """Per host."""
    link: Link | None = None
    """Between hosts. None: one host."""
    sharing: float = 1.0
    """Slowdown of two workers on a host: they share the processor's caches, and wait for the slower one."""
    memory_step_s: float = 0.0
    """Constant part of a sum through shared memory, measured with two workers."""
    memory_byte_s: float = 0.0
    """Part for each byte of each worker."""
    message_s: float = 0.0
    """Seconds of a message through the process group, in addition to the link's delay."""
    waiting: float = 1.0
    """Slowdown if there are more workers than cores, in addition to taking turns: workers wait for each other."""


def step_s(model: Model, plan: Plan, batch_size: int) -> float:
    """Predict the seconds of a step.

    The worker with the largest slice decides. If there are more workers than cores, they take turns. Through shared
    memory, each worker sums the gradients of all. Between hosts, the gradients go around a ring: 2 (W - 1) messages,
    each with 1/W of the gradients (Patarasu and Yuan, 2009). Communication and computation do not overlap: this
    project's small models have one bucket of gradients.
    """
    turns = max(1.0, plan.num_workers / plan.num_hosts / plan.cores)
    turns *= plan.waiting if turns > 1 else 1.0
    compute = model.compute_s(math.ceil(batch_size / plan.num_workers)) * turns
    compute *= plan.sharing if plan.num_workers > plan.num_hosts else 1.0
    if plan.num_workers == 1:
        return compute
    if plan.link is None:
        return compute + (plan.memory_step_s + plan.memory_byte_s * model.num_bytes * plan.num_workers) * turns
    return compute + ring_s(model, plan.num_workers, plan.link, plan.message_s)


def ring_s(model: Model, number: int, link: Link, message_s: float) -> float:
    """Predict the seconds of a ring all-reduce of the gradients over ``number`` processes."""
    return 2 * (number - 1) * (link.delay_s + message_s + model.num_bytes / number / link.bytes_per_s)


def hierarchical_step_s(model: Model, plan: Plan, batch_size: int) -> float:
    """Predict the seconds of a step if workers sum within their host first, and only hosts exchange gradients."""
    within = replace(plan, num_workers=max(1, plan.num_workers // plan.num_hosts), num_hosts=1, link=None)
    alone = step_s(model, within, math.ceil(batch_size / plan.num_hosts))
    assert plan.link is not None
    return alone + ring_s(model, plan.num_hosts, plan.link, plan.message_s)


def checkpoint_interval_s(checkpoint_s: float, hours_between_failures: float, num_hosts: int) -> float:
    """Return the interval at which writing checkpoints and repeating steps cost least: sqrt(2 C M) (Young, 1974).

    ``hours_between_failures`` is for a single host.
    """
    return math.sqrt(2 * checkpoint_s * hours_between_failures * 3600 / num_hosts)


def lost_to_failures(checkpoint_s: float, restart_s: float, hours_between_failures: float, num_hosts: int) -> float:
    """Return the share of time lost to checkpoints, repeated steps and restarts at that interval."""
    between_s = hours_between_failures * 3600 / num_hosts
    every_s = checkpoint_interval_s(checkpoint_s, hours_between_failures, num_hosts)
    return min(1.0, checkpoint_s / every_s + (every_s / 2 + restart_s) / between_s)


# --- measuring


def train_steps(group: Group, batch_size: int, num_steps: int) -> float:
    """Train as one rank in this process; return the seconds per step after the first tenth of the steps."""
    torch.set_num_threads(1)
    workload = loading.load(loading.DEFAULT)()
    split = Split(data_of(workload).train)
    config = TrainConfig(
        precision="fp32", batch_size=batch_size, schedule="constant", num_epochs=1000, checkpoint_every=10**9
    )
    return timed_steps(workload, split, config, group, num_steps).step_s


def run_rank(rank: int, num_workers: int, batch_size: int, num_steps: int, meeting: str) -> None:
    """Train as one of several ranks; rank 0 prints the seconds per step."""
    group = Group(rank, num_workers)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers)
    seconds = train_steps(group, batch_size, num_steps)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    os._exit(0)  # no clean-up with the other ranks: they may have exited


def measured_step_s(num_workers: int, batch_size: int, num_steps: int, hosts: bool = False) -> float:
    """Measure the seconds per step of workers on this machine, or of one worker on each host."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"tcp://{ADDRESSES[0]}:{PORT}" if hosts else f"file://{folder}/store"
        processes = []
        for rank in range(num_workers):
            # Each host has its own core and shared memory.
            prefix = ["ip", "netns", "exec", HOSTS[rank], *OWN_MEMORY] if hosts else []
            interface = {"GLOO_SOCKET_IFNAME": "eth0" if hosts else "lo"}
            arguments = [str(value) for value in (rank, num_workers, batch_size, num_steps)]
            command = [*prefix, sys.executable, __file__, "--rank", *arguments, meeting]
            processes.append(
                subprocess.Popen(command, env={**os.environ, **interface}, stdout=subprocess.PIPE, text=True)
            )
        printed = [process.communicate()[0] for process in processes]
    return float(json.loads(printed[0].splitlines()[-1]))


@contextlib.contextmanager
def linked(link: Link | None) -> Iterator[None]:
    """Create two network namespaces joined by a link, which is slowed down unless ``link`` is None."""
    _ip("link add mnistray-a0 type veth peer name mnistray-b0")
    try:
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            _ip(f"netns add {host}")
            _ip(f"link set {host}0 netns {host} name eth0")
            for command in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
                _ip(f"-n {host} {command}")
            if link is not None:
                slow = f"qdisc add dev eth0 root tbf rate {link.megabit_s}mbit burst 16kb latency 1s"
                subprocess.run(["ip", "netns", "exec", host, "tc", *slow.split()], check=True)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False, stderr=subprocess.DEVNULL)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def large_model(num_steps: int) -> Model:
    """Measure a model of 100 million parameters in four layers, on one thread."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(5000, 5000), nn.ReLU())))
    seconds = {}
    for batch_size in (16, 64):
        inputs, times = torch.randn(batch_size, 5000), []
        for _ in range(num_steps):
            start = time.perf_counter()
            model.zero_grad()
            model(inputs).square().mean().backward()
            times.append(time.perf_counter() - start)
        seconds[batch_size] = statistics.median(times)
    return Model(4 * 100e6, tuple(seconds), tuple(seconds.values()))


@dataclass(frozen=True)
class Point:
    """A measurement: several workers on this machine, or one on each of two hosts."""

    num_workers: int
    batch_size: int
    megabit_s: float | None = None
    """Speed of the link between two hosts. Infinite: not slowed down. None: one host."""

    def __str__(self) -> str:
        if self.megabit_s is None:
            return f"{self.num_workers} worker{'s' * (self.num_workers > 1)}, batch {self.batch_size}"
        return f"2 hosts, {self.megabit_s:g} Mbit/s, batch {self.batch_size}"


# The constants come from other points than the predictions.
ALONE = [Point(1, size) for size in (16, 48, 96, 192, 384)]
TWO = [Point(2, 32), Point(2, 256)]
FOUR = [Point(4, 32), Point(4, 96), Point(4, 256)]
TWO_HOSTS = Point(2, 128, math.inf)
PREDICTED = [Point(num_workers, batch_size) for num_workers in (1, 2, 4) for batch_size in (64, 128, 512)]
PREDICTED_HOSTS = [Point(2, batch_size, megabit_s) for megabit_s in (200, 50, 10) for batch_size in (64, 256)]


def measured_points(points: Sequence[Point], num_images: int, num_rounds: int) -> dict[Point, float]:
    """Measure the seconds per step at each point, in turn; return the medians over the rounds."""
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for _ in range(num_rounds):
        for point, times in seconds.items():
            num_steps = max(30, num_images // point.batch_size)
            if point.megabit_s is None:
                times.append(measured_step_s(point.num_workers, point.batch_size, num_steps))
                continue
            with linked(None if math.isinf(point.megabit_s) else Link(point.megabit_s)):
                times.append(measured_step_s(2, point.batch_size, max(30, num_steps // 5), hosts=True))
    return {point: statistics.median(times) for point, times in seconds.items()}


def calibrated(measured: dict[Point, float]) -> tuple[Model, Plan]:
    """Return the constants of the default recipe's network on this machine."""
    model = Model(4 * 49_770, tuple(p.batch_size for p in ALONE), tuple(measured[p] for p in ALONE))
    plan = Plan(2, 1, len(os.sched_getaffinity(0)))
    few, many = ((model.compute_s(point.batch_size // 2), measured[point]) for point in TWO)
    sharing = max(1.0, (many[1] - few[1]) / (many[0] - few[0]))
    plan = replace(plan, sharing=sharing, memory_step_s=max(0.0, few[1] - sharing * few[0]))
    if plan.cores < 4:
        longer = [measured[p] / step_s(model, replace(plan, num_workers=4), p.batch_size) for p in FOUR]
        plan = replace(plan, waiting=statistics.median(longer))
    if TWO_HOSTS in measured:
        alone = step_s(model, replace(plan, num_workers=1), TWO_HOSTS.batch_size // 2)
        plan = replace(plan, message_s=max(0.0, (measured[TWO_HOSTS] - alone) / 2))
    return model, plan


def check(model: Model, plan: Plan, measured: dict[Point, float]) -> None:
    """Print predictions and measurements, and how many predictions are within the tolerance."""
    print("| | predicted, ms | measured, ms | error |\n|---|---|---|---|")
    num_near = 0
    points = [point for point in PREDICTED + PREDICTED_HOSTS if point in measured]
    for point in points:
        here = replace(plan, num_workers=point.num_workers)
        if point.megabit_s is not None:
            here = replace(here, num_hosts=2, cores=1, link=Link(point.megabit_s))
        predicted = step_s(model, here, point.batch_size)
        error = predicted / measured[point] - 1
        num_near += abs(error) <= TOLERANCE
        print(f"| {point} | {predicted * 1e3:.2f} | {measured[point] * 1e3:.2f} | {error:+.0%} |")
    print(f"{num_near} of {len(points)} within {TOLERANCE:.0%}")


def print_plans(name: str, model: Model, plan: Plan, workers_a_host: int, batch_sizes: Sequence[int]) -> None:
    """Print the predicted images/s of more workers, with this design and others."""
    print(f"\n{name}, {workers_a_host} workers per host, one per core\n")
    print("| workers | batch | images/s | share of ideal | hierarchical | 1 byte per gradient | a sum every 8 steps |")
    print("|---|---|---|---|---|---|---|")
    for num_workers in (1, 10, 100, 1000):
        for batch_size in batch_sizes:
            if batch_size < num_workers:
                continue
            num_hosts = max(1, math.ceil(num_workers / workers_a_host))
            some = replace(plan, num_workers=num_workers, num_hosts=num_hosts, cores=workers_a_host)
            some = some if num_hosts > 1 else replace(some, link=None)
            seconds = step_s(model, some, batch_size)
            alone = step_s(model, replace(some, num_workers=1, num_hosts=1, link=None), batch_size)
            small = replace(model, num_bytes=model.num_bytes / 4)
            local = step_s(model, replace(some, num_workers=1), math.ceil(batch_size / num_workers))
            others = [
                hierarchical_step_s(model, some, batch_size) if num_hosts > 1 else seconds,
                step_s(small, some, batch_size),
                local + (seconds - local) / 8,
            ]
            rates = " | ".join(f"{batch_size / other:,.0f}" for other in others)
            ideal = alone / num_workers / seconds
            print(f"| {num_workers:,} | {batch_size:,} | {batch_size / seconds:,.0f} | {ideal:.0%} | {rates} |")


def print_checkpoints(name: str, num_bytes: float, restart_s: float) -> None:
    """Print the best checkpoint interval for several rates of failure, and the share of time lost."""
    print(f"\nBest interval, lost time: {name}, {3 * num_bytes / 1e6:,.1f} MB checkpoints, {restart_s:.0f} s restart\n")
    print("| hosts | each fails every | training waits (writes 100 MB/s) | training continues |")
    print("|---|---|---|---|")
    for num_hosts in (2, 13, 125):
        for hours in (24, 720):
            cells = []
            for checkpoint_s in (3 * num_bytes / 100e6 + 0.05, 3 * num_bytes / 2e9 + 0.01):
                every_s = checkpoint_interval_s(checkpoint_s, hours, num_hosts)
                lost = lost_to_failures(checkpoint_s, restart_s, hours, num_hosts)
                cells.append(f"{every_s:,.0f} s, {lost:.2%}")
            print(f"| {num_hosts} | {hours} h | {cells[0]} | {cells[1]} |")


def main() -> None:
    """Measure, predict, check, and print the tables."""
    if sys.argv[1:2] == ["--rank"]:
        rank, num_workers, batch_size, num_steps = map(int, sys.argv[2:6])
        run_rank(rank, num_workers, batch_size, num_steps, sys.argv[6])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure few steps")
    parser.add_argument("--restart-s", type=float, default=3.0, help="seconds from a worker's loss to the next step")
    args = parser.parse_args()
    num_images, num_rounds = (5_000, 1) if args.quick else (25_000, 3)
    points = [*ALONE, *TWO, *FOUR, *PREDICTED]
    if os.geteuid() == 0 and shutil.which("tc") is not None:
        points += [TWO_HOSTS, *PREDICTED_HOSTS]
    measured = measured_points(points, num_images, num_rounds)
    model, plan = calibrated(measured)
    print(f"{model}\n{plan}\n")
    check(model, plan, measured)
    wide = replace(plan, link=Link(10_000, 50e-6))
    print_plans("49,770 parameters, 10 Gbit/s", model, wide, 8, (128, 4096, 65_536))
    large = large_model(3 if args.quick else 10)
    print_plans("100 million parameters, 10 Gbit/s", large, wide, 8, (128, 4096, 65_536))
    print_checkpoints("49,770 parameters", model.num_bytes, args.restart_s)
    print_checkpoints("100 million parameters", large.num_bytes, args.restart_s)


if __name__ == "__main__":
    main()
