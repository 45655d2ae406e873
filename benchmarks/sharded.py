"""Measure memory, checkpoints and speed of sharded training.

    python benchmarks/sharded.py     # 9 minutes on two cores

Guards ``--strategy fsdp``: it divides a model among the workers, any number of workers resumes a checkpoint and each
reads only its rows. The project's engine trains a GPT of 100 million parameters in processes of its own, without Ray.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from mnist_ray.checkpoints import checkpoint
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.data.tensors import rows_here
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.process import keep_freed_memory
from mnist_ray.storage import RunFolder, locate
from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Arrays, Workload

CONFIG = TrainConfig(precision="fp32", num_epochs=1, optimizer="adamw", learning_rate=3e-4, lr_schedule="constant")
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """The size of a GPT, and of its data."""

    width: int = 768
    depth: int = 14
    vocabulary: int = 256  # bytes
    length: int = 32


TINY = Size(width=64, depth=2)


class Block(nn.Module):
    """A block with pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"attention": nn.LayerNorm(width), "mlp": nn.LayerNorm(width)})
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states, (N, T, width)."""
        size = (*hidden.shape[:2], -1, 64)
        q, k, v = (part.view(size).transpose(1, 2) for part in self.qkv(self.norms["attention"](hidden)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(hidden.shape)
        hidden = hidden + self.out(seen)
        return hidden + self.mlp(self.norms["mlp"](hidden))


class GPT(nn.Module):
    """A language model."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.depth))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, (N, T, vocabulary)."""
        hidden = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Tokens(Workload):
    """Which token is next?"""

    size = Size()

    def create_model(self) -> nn.Module:
        """Return the GPT."""
        return GPT(self.size)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the tokens of each example."""
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


def workload_of(size: Size) -> Workload:
    """Return the workload of a size."""
    return type("Tokens", (Tokens,), {"size": size})()


def examples(size: Size, number: int) -> Arrays:
    """Return sequences in which a token mostly follows from the one before."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, size.vocabulary, (number, 1)) + np.arange(size.length + 1) * 7
    noise = generator.integers(0, size.vocabulary, tokens.shape)
    tokens = np.where(generator.random(tokens.shape) < 0.1, noise, tokens) % size.vocabulary
    return Arrays(tokens[:, :-1].copy(), tokens[:, 1:].copy())


def pss_mib() -> float:
    """Return the memory of this process; shared pages are divided among processes."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


class Peak:
    """The largest memory of this process since the last call of ``take``, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._largest = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._largest = max(self._largest, pss_mib())
            time.sleep(0.02)

    def take(self) -> float:
        """Return it in MiB, and begin again."""
        largest, self._largest = max(self._largest, pss_mib()), 0.0
        return largest


class Hooks(Callback):
    """Notes losses, the time of steps and, at a checkpoint, what it costs."""

    def __init__(self, group: Group, run: RunFolder | None, peak: Peak) -> None:
        self.losses: list[float] = []
        self.step_s: list[float] = []
        self.figures: dict[str, float] = {}
        self._group, self._run, self._peak, self._writing = group, run, peak, threading.Thread()
        self._last = time.perf_counter()

    def on_step(self, state: TrainingState) -> None:
        """Note the time of a step."""
        now = time.perf_counter()
        self.step_s.append(now - self._last)
        self._last = now

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """Note the losses."""
        self.losses += progress.losses

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """Write one checkpoint in a thread, as a worker does, in mid-run."""
        if self._run is None or state.step == 0 or self.figures:
            return
        self.figures["before_mib"], start = self._peak.take(), time.perf_counter()
        taken = checkpoint.snapshot(state, {"workload": {}}, group=self._group) if self._writes(state) else None
        self.figures["stall_s"] = time.perf_counter() - start
        if taken is not None:
            self._writing = threading.Thread(target=taken.write, args=[self._run.inside("checkpoint"), self._writers])
            self._writing.start()

    def _writes(self, state: TrainingState) -> bool:
        return self._group.rank == 0 or state.is_sharded

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Let the threads that write have a group of their own."""
        self._writers = dist.new_group(backend="gloo") if state.is_sharded else None

    def finish(self) -> None:
        """Wait for the checkpoint, and note the memory meanwhile."""
        if self._run is not None:
            if self._writing.ident:
                self._writing.join()
            self.figures["writing_mib"] = self._peak.take()


Work = Callable[..., dict[str, Any]]


def as_rank(rank: int, world_size: int, port: int, folder: str, work: Work, *args: Any) -> None:
    """Call ``work`` on a rank; write what it returns."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(work(Group(rank, world_size), *args)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world_size: int, work: Work, *args: Any) -> list[dict[str, Any]]:
    """Return what ``work(group, *args)`` returns on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        port = 20_000 + time.monotonic_ns() % 10_000
        spawn(as_rank, (world_size, port, folder, work, *args), world_size)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def train(group: Group, size: Size, config: TrainConfig, num_steps: int, storage: str | None = None) -> dict[str, Any]:
    """Train for some steps; return figures of this rank."""
    base, peak, workload = pss_mib(), Peak(), workload_of(size)
    state = create_state(workload, config, num_steps * config.batch_size, group)
    start_mib = peak.take()
    keep_freed_memory(is_sharded=state.is_sharded)  # as a worker does
    hooks = Hooks(group, None if storage is None else locate(storage, "run"), peak)
    split = Split(examples(size, num_steps * config.batch_size))
    Trainer(workload, state, split, config, group, [hooks]).train()
    hooks.finish()
    model = sharding.on_meta(workload)[0]
    assert model is not None
    held = 16 * sum(parameter.numel() for parameter in model.parameters())  # weights, gradients and Adam's state
    if state.is_sharded:
        held //= group.world_size
    unit = sum(parameter.nbytes for parameter in model.blocks[0].parameters())  # type: ignore[index,union-attr]
    root = sum(parameter.nbytes for parameter in model.parameters()) - size.depth * unit
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # FSDP gathers what is in no unit, and two units at a time; these have gradients, and buffers for gloo. DDP has a
    # copy of all gradients.
    more = 2 * root + 6 * unit if state.is_sharded else trained if group.world_size > 1 else 0
    return {
        "base_mib": base,
        "start_mib": start_mib,
        "peak_mib": max(start_mib, peak.take()),
        "predicted_mib": base + (held + more) / MIB,
        "step_s": sorted(hooks.step_s[2:])[len(hooks.step_s[2:]) // 2],
        "losses": hooks.losses,
        **hooks.figures,
    }


def train_warm(group: Group, *args: Any) -> dict[str, Any]:
    """Train after a tiny model, with which this process loads all that it needs."""
    train(group, TINY, args[1], 3)
    return train(group, *args)


def resume(group: Group, size: Size, config: TrainConfig, storage: str) -> dict[str, Any]:
    """Read a checkpoint; return the bytes that this rank has read, and its share of all."""
    state = create_state(workload_of(size), config, config.batch_size * 8, group)
    read_whole, read_bytes = RunFolder.read_bytes, 0

    def counted(folder: RunFolder, file_name: str) -> bytes | None:
        nonlocal read_bytes
        content = read_whole(folder, file_name)
        read_bytes += len(content or b"")
        return content

    RunFolder.read_bytes = counted  # type: ignore[method-assign,assignment]
    start = time.perf_counter()
    folder = locate(storage, "run").inside("checkpoint")
    checkpoint.load(checkpoint.read(folder, state)[1], state, [], folder)
    seconds, tensors = time.perf_counter() - start, [*state.model.parameters()]
    own = sum(rows_here(tensor).nbytes for tensor in tensors) * 3  # weights, and two moments
    return {"read": read_bytes, "share": own, "seconds": seconds}


def measure_memory(storage: str) -> None:
    """Print the memory, the time of a step and the costs of a checkpoint."""
    print("| strategy | workers | MiB at most | predicted | ratio | MiB at the start | seconds a step |")
    print("|---|---|---|---|---|---|---|")
    size, peaks, steps, written = Size(), {}, {}, []
    for strategy in ("ddp", "fsdp"):
        for number in (1, 2, 4):
            config = replace(CONFIG, strategy=strategy, batch_size=4, checkpoint_every=4)
            folder = f"{storage}/{strategy}-{number}"
            ranks = on_ranks(number, train_warm, size, config, 8, folder)
            most = max(ranks, key=lambda rank: rank["before_mib"])
            peaks[strategy, number], steps[strategy, number] = most["before_mib"], most["step_s"]
            start = max(rank["start_mib"] for rank in ranks)
            written.append((strategy, number, max(ranks, key=lambda rank: rank["writing_mib"] / rank["before_mib"])))
            print(
                f"| {strategy} | {number} | {most['before_mib']:,.0f} | {most['predicted_mib']:,.0f} | "
                f"{most['before_mib'] / most['predicted_mib']:.2f} | {start:,.0f} | {most['step_s']:.2f} |",
                flush=True,
            )
    print(f"\nfsdp / ddp: memory of 4 workers {peaks['fsdp', 4] / peaks['ddp', 4]:.2f}, ", end="")
    print(f"time of a step of 2 workers {steps['fsdp', 2] / steps['ddp', 2]:.2f}\n")
    print("| strategy | workers | MiB while a checkpoint is written / before | training stands still for |")
    print("|---|---|---|---|")
    for strategy, number, rank in written:
        writing, before = rank["writing_mib"], rank["before_mib"]
        ratio = f"{writing:,.0f} / {before:,.0f} = {writing / before:.2f}"
        print(f"| {strategy} | {number} | {ratio} | {rank['stall_s']:.2f} s |")
    print("\n| the checkpoint of 4 workers, resumed by | bytes read / share, at most | seconds |\n|---|---|---|")
    for number in (2, 3, 8):
        config = replace(CONFIG, strategy="fsdp", batch_size=8)
        ranks = on_ranks(number, resume, size, config, f"{storage}/fsdp-4")
        most, slowest = max(rank["read"] / rank["share"] for rank in ranks), max(rank["seconds"] for rank in ranks)
        print(f"| {number} | {most:.3f} | {slowest:.1f} |")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {psutil.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as storage:
        measure_memory(storage)
