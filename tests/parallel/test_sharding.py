"""Training whose model is sharded over one to three ranks, beside a loop of plain PyTorch."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mnist_ray.checkpoints import checkpoint, state_file
from mnist_ray.checkpoints.find import load_model, read_weights
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.tensors import rows_here
from mnist_ray.errors import TrainingStoppedError, UsageError
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.storage import RunFolder, checkpoint_name, locate
from mnist_ray.training.evaluation import evaluate, evaluate_together
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Workload
from tests.conftest import folder_at
from tests.ranks import Hooks, call_on_ranks

NUM_WORDS, WIDTH = 11, 10  # neither can be divided evenly by all numbers of ranks
CONFIG = TrainConfig(
    strategy="fsdp",
    precision="fp32",
    num_epochs=1,
    batch_size=26,
    learning_rate=1e-2,
    optimizer="adamw",
    lr_schedule="one-cycle",
)
MIDDLE, END = checkpoint_name(0, 4), checkpoint_name(1, 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))  # has fewer rows than there are ranks
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.drop(self.scale * F.gelu(self.layer(self.norm(hidden))))


class Stack(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(NUM_WORDS, WIDTH), nn.Linear(WIDTH, NUM_WORDS)
        self.head.weight = self.words.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        for block in self.blocks:
            block.drop.p = dropout  # type: ignore[union-attr]

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words).mean(1)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class Words(Workload):
    """Which word comes most often?"""

    dropout = 0.0

    def create_model(self) -> nn.Module:
        return Stack(self.dropout)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")


class Frozen(Words):
    def create_model(self) -> nn.Module:
        model = Stack()
        for parameter in (*model.blocks[0].parameters(), model.head.bias):
            parameter.requires_grad = False
        return model


class Masked(Words):
    """Its model cannot be created without memory: its mask is not saved."""

    def create_model(self) -> nn.Module:
        model = Stack()
        model.register_buffer("mask", torch.arange(WIDTH) / WIDTH, persistent=False)
        model.blocks[0].register_forward_pre_hook(lambda block, inputs: inputs[0] * model.mask)
        return model


class Varying(Words):
    """Its ranks draw random numbers, and have batch statistics, of their own."""

    dropout = 0.5

    def create_model(self) -> nn.Module:
        model = Stack(self.dropout)
        model.blocks[1] = nn.BatchNorm1d(WIDTH)
        return model


CASES: dict[str, tuple[type[Words], dict[str, Any]]] = {
    "plain": (Words, {}),
    "micro-batches": (Words, {"micro_batch_size": 5, "clip_grad_norm": 0.1}),  # of slices of 13, or of 8 and 9
    "empty slices": (Words, {"batch_size": 2, "optimizer": "sgd", "learning_rate": 0.02}),
    "frozen": (Frozen, {"ema_decay": 0.8, "clip_grad_norm": 0.1}),
    "masked": (Masked, {"ema_decay": 0.8}),
}


def config_of(case: str) -> TrainConfig:
    return replace(CONFIG, **CASES[case][1])


def few_words(config: TrainConfig = CONFIG) -> Arrays:
    """Return examples for 6 steps of an epoch; the last one has fewer, but with the smallest batches."""
    words = np.random.default_rng(0).integers(0, NUM_WORDS, (6 * config.batch_size * 9 // 10 + 1, 5))
    return Arrays(words, np.array([np.bincount(row).argmax() for row in words]))


def trained(
    workload: Words, config: TrainConfig, group: Group, run: RunFolder, resumed: RunFolder | None = None
) -> tuple[TrainingState, list[float], list[tuple[int, float]]]:
    """Train, with a checkpoint in the middle and at the end; return the state and the loss of each step.

    And, for each report that has it, the number of steps so far and the largest gradient norm since the report before.
    """
    losses, norms = list[float](), list[tuple[int, float]]()

    def save(state: TrainingState, progress: Progress) -> None:
        about: dict[str, Any] = {"workload": {}, "metrics": {}}
        taken = checkpoint.snapshot(state, about, group=group)
        if (name := checkpoint_name(state.epoch, state.step)) in (MIDDLE, END):
            taken.write(run.inside(name), dist.group.WORLD if state.is_sharded else None)

    def note(state: TrainingState, progress: Progress) -> None:
        losses.extend(progress.losses)
        if (norm := progress.others.get("gradient_norm")) is not None:
            norms.append((len(losses), norm))

    split = Split(few_words(config))
    state = create_state(workload, config, len(split), group)
    if resumed is not None:
        checkpoint.restore_newest(resumed, state, group=group)
        assert state.step == 4  # MIDDLE
    hooks = Hooks(on_progress=note, on_checkpoint=save)
    Trainer(workload, state, split, replace(config, checkpoint_every=4), group, [hooks]).train()
    return state, losses, norms


def only_middle(run: RunFolder, group: Group) -> RunFolder:
    """Return a run with nothing but the checkpoint in the middle of another one."""
    cut = locate(run.uri, f"cut-{group.world_size}")
    if group.rank == 0:
        for path in Path(run.inside(MIDDLE).path).iterdir():
            cut.inside(MIDDLE).write_files({path.name: [path.read_bytes()]})
    if group.world_size > 1:
        dist.barrier()
    return cut


def train_cases(rank: int, folder: Path) -> None:
    """Train each case on one to three ranks, and go on from the middle with other numbers; save losses and weights."""
    for world_size in (1, 2, 3):
        if rank >= world_size:
            continue
        group, storage = Group(rank, world_size), str(folder)
        store = f"file://{folder}/store-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        losses, norms = {}, {}
        for case, (kind, _) in CASES.items():
            run = locate(storage, f"{case}-{world_size}")
            state, losses[case], norms[case] = trained(kind(), config_of(case), group, run)
            split = Split(few_words(replace(CONFIG, batch_size=50)))  # of three batches for an evaluation
            together = evaluate_together(kind(), state.result, split, CONFIG, group)
            alone = evaluate(kind(), load_model(run.inside(END), kind()), split, CONFIG)
            assert together.batch_sums == alone.batch_sums, case
        for before in range(1, world_size + 1):
            cut = only_middle(locate(storage, f"frozen-{before}"), group)
            trained(Frozen(), config_of("frozen"), group, locate(storage, f"from {before} to {world_size}"), cut)
        run = locate(storage, f"varying-{world_size}")
        trained(Varying(), CONFIG, group, run)
        trained(Varying(), CONFIG, group, locate(storage, f"resumed varying-{world_size}"), only_middle(run, group))
        if rank == 0:
            (folder / f"losses-{world_size}.json").write_text(json.dumps([losses, norms]))
        if world_size == 2:
            check_damage(locate(storage, "plain-2"), group)
            check_failure(locate(storage, "failed").inside(MIDDLE), group)
            check_scale(group)
            check_plain_state(group)
            check_later_freeze(group)
            check_divergence(group)
        dist.destroy_process_group()


def check_damage(run: RunFolder, group: Group) -> None:
    """A checkpoint of which one rank cannot read its rows is damaged for all: the one before is used."""
    path = Path(run.inside(END).path) / "model-00002-of-00002.safetensors"
    content = path.read_bytes()
    dist.barrier()
    if group.rank == 0:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()
    state = create_state(Words(), CONFIG, 141, group)
    _, skipped = checkpoint.restore_newest(run, state, group=group)
    assert skipped == (END,)
    assert (state.epoch, state.step) == (0, 4)
    dist.barrier()
    if group.rank == 0:
        path.write_bytes(content)


def check_failure(folder: RunFolder, group: Group) -> None:
    """Rank 0 raises the error of a rank that cannot write, and writes no state.json."""
    if group.rank == 0:
        (Path(folder.path) / "model-00002-of-00002.safetensors").mkdir(parents=True)
    dist.barrier()
    taken = checkpoint.snapshot(create_state(Words(), CONFIG, 141, group), {}, group=group)
    with pytest.raises(IsADirectoryError) if group.rank == 0 else contextlib.nullcontext():
        taken.write(folder, dist.group.WORLD)
    dist.barrier()
    assert not folder.exists("state.json")


def check_scale(group: Group) -> None:
    """Infinite gradients in the rows of one rank make all ranks skip a step of fp16."""
    weights: list[Tensor] = []

    def spoil(state: TrainingState) -> None:
        if state.step == 3 and group.rank == 1:
            gradient = next(state.model.parameters()).grad
            assert gradient is not None
            rows_here(gradient)[:] = math.inf

    def note(state: TrainingState) -> None:
        weights.append(rows_here(next(state.model.parameters())).detach().clone())

    class Spoils(torch.amp.GradScaler):
        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            spoil(state)
            super().unscale_(optimizer)

    config = replace(CONFIG, precision="fp16", num_epochs=1)
    state = create_state(Words(), config, 141, group)
    state.scaler = Spoils("cpu", init_scale=8.0)
    Trainer(Words(), state, Split(few_words()), config, group, [Hooks(on_step=note)]).train()
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[4], weights[3])
    assert state.scaler.get_scale() == 4.0


def check_later_freeze(group: Group) -> None:
    """A layer that is frozen after the start is one line: FSDP has noted which gradients to add up."""
    state = create_state(Words(), CONFIG, 141, group)
    hooks = Hooks(on_step=lambda state: next(state.model.parameters()).requires_grad_(False))
    with pytest.raises(TrainingStoppedError, match=r"^--strategy fsdp: a callback has changed .* in on_start$"):
        Trainer(Words(), state, Split(few_words()), CONFIG, group, [hooks]).train()


def check_divergence(group: Group) -> None:
    """A weight that is not finite, in the rows of one rank, ends the training of all before a checkpoint is saved."""

    def spoil(state: TrainingState, progress: Progress) -> None:
        if group.rank == 1:
            rows_here(next(state.model.parameters()).detach())[:] = math.nan

    saved: list[int] = []
    hooks = Hooks(on_epoch=spoil, on_checkpoint=lambda state, progress: saved.append(state.step))
    state = create_state(Words(), CONFIG, 141, group)
    with pytest.raises(TrainingDivergedError):
        Trainer(Words(), state, Split(few_words()), CONFIG, group, [hooks]).train()
    assert saved == []


def check_plain_state(group: Group) -> None:
    """A checkpoint refuses a plain tensor of a rank's rows, of which rank 0 would write its own for all."""
    state = create_state(Words(), CONFIG, 141, group)
    of_first = state.optimizer.state[parameter := next(state.model.parameters())]
    of_first |= {"step": torch.tensor(3.0), "momentum": torch.zeros_like(parameter)}
    checkpoint.snapshot(state, {}, group=group)
    of_first["history"] = [torch.zeros_like(rows_here(parameter))]
    with pytest.raises(TrainingStoppedError, match=r"^--strategy fsdp: AdamW keeps a worker's rows in .*zeros_like"):
        checkpoint.snapshot(state, {}, group=group)


@pytest.fixture(scope="module")
def runs(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    call_on_ranks(ranks, train_cases, folder)
    return folder


def train_plainly(case: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Return each step's loss and gradient norm, and the last weights or their EMA, of a loop of plain PyTorch.

    It computes whole batches.
    """
    kind, config = CASES[case][0], config_of(case)
    words = few_words(config)
    torch.manual_seed(config.seed)
    model = kind().create_model()
    total_steps = config.total_steps(len(words))
    optimizer = kind().create_optimizer(model, config)
    scheduler = kind().create_scheduler(optimizer, config, total_steps)
    inputs, targets = torch.tensor(words.inputs), torch.tensor(words.targets)
    losses, norms, average = [], [], dict[str, Tensor]()
    for epoch in range(config.num_epochs):
        for indices, *_ in ShardedBatchSampler(len(words), config.batch_size, seed=config.seed, pass_number=epoch):
            chosen = torch.from_numpy(indices)
            loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf).item())
            optimizer.step()
            scheduler.step()
            decay = config.ema_decay or 0.0 if average else 0.0
            for name, value in model.state_dict().items():
                average[name] = decay * average.get(name, 0) + (1 - decay) * value
    return losses, norms, average if config.ema_decay else model.state_dict()


def weights_in(run: Path) -> dict[str, Tensor]:
    return read_weights(folder_at(run / END))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_training_agrees_with_a_plain_loop(runs: Path, case: str, world_size: int) -> None:
    losses, norms, weights = train_plainly(case)
    of_cases, norms_of_cases = json.loads((runs / f"losses-{world_size}.json").read_text())
    found, largest = of_cases[case], norms_of_cases[case]
    assert found[0] == pytest.approx(losses[0], rel=1e-5)
    assert found == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0]
    ends = [0, *(end for end, _ in largest)]
    expected = [max(norms[start:end]) for start, end in itertools.pairwise(ends)]
    assert [norm for _, norm in largest] == pytest.approx(expected, rel=1e-3)
    assert bool(largest) == ("clip_grad_norm" in CASES[case][1])
    of_run = weights_in(runs / f"{case}-{world_size}")
    assert all(torch.allclose(of_run[name], value, atol=1e-3) for name, value in weights.items())
    assert of_run.keys() == weights.keys()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(runs: Path, before: int, after: int) -> None:
    found, expected = weights_in(runs / f"from {before} to {after}"), weights_in(runs / f"frozen-{after}")
    assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in expected.items())


@pytest.mark.parametrize("before", [2, 3])
def test_a_sharded_run_goes_on_unsharded(runs: Path, tmp_path: Path, before: int) -> None:
    cut = only_middle(locate(str(runs), f"frozen-{before}"), Group())
    trained(Frozen(), replace(config_of("frozen"), strategy="ddp"), Group(), locate(str(tmp_path), "run"), cut)
    found, expected = weights_in(tmp_path / "run"), weights_in(runs / "frozen-1")
    assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in expected.items())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_run_has_the_same_bits_with_as_many_ranks(runs: Path, world_size: int) -> None:
    pairs = [(f"from {world_size} to {world_size}", f"frozen-{world_size}")]
    for resumed, whole in [*pairs, (f"resumed varying-{world_size}", f"varying-{world_size}")]:
        found, expected = weights_in(runs / resumed), weights_in(runs / whole)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), resumed


def test_each_rank_writes_its_rows_as_torch_chunk_divides_them(runs: Path) -> None:
    folder, key = runs / "plain-3" / END, "blocks.0.layer.weight"
    whole = weights_in(runs / "plain-3")
    parts = [load_file(folder / f"model-{number:05d}-of-00003.safetensors") for number in (1, 2, 3)]
    for part, rows in zip(parts, whole[key].chunk(3), strict=True):
        assert torch.equal(part[key], rows)
    assert ["blocks.0.scale" in part for part in parts] == [True, False, False]


@pytest.mark.parametrize("damage", ["missing", "of another run", "changed"])
def test_a_checkpoint_with_a_damaged_part_is_damaged(runs: Path, tmp_path: Path, damage: str) -> None:
    for path in (runs / "plain-3" / END).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    part = tmp_path / "optimizer-00003-of-00003.safetensors"
    content = part.read_bytes()
    part.unlink()
    if damage == "of another run":
        part.write_bytes((runs / "masked-3" / END / part.name).read_bytes())
    if damage == "changed":
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    state = create_state(Words(), replace(CONFIG, strategy="ddp"), 141, Group())
    with pytest.raises(state_file.DamagedCheckpointError, match=r"optimizer-00003-of-00003\.safetensors: "):
        checkpoint.read(folder_at(tmp_path), state)


# --- one process ---


def other(create: Callable[[], nn.Module]) -> Words:
    class Other(Words):
        def create_model(self) -> nn.Module:
            return create()

    return Other()


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.ones(1).item()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.masks = [torch.ones(2)]


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Words(), ""),
        (Masked(), "buffer mask is not persistent"),
        (other(Item), "Tensor.item()"),
        (other(Plain), "Plain has a tensor that is neither a parameter nor a buffer"),
    ],
)
def test_a_model_is_created_without_memory_or_says_why_it_must_be_created_whole(workload: Words, reason: str) -> None:
    model, found = sharding.on_meta(workload)
    assert (model is None, reason in found) == (bool(reason), True)
    assert model is None or all(parameter.is_meta for parameter in model.parameters())


def shared() -> nn.Module:
    model = Stack()
    model.blocks[1].layer = model.blocks[0].layer
    return model


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: nn.Linear(2, 2), r"has no units for --strategy fsdp; put its blocks into an nn\.ModuleList"),
        (shared, r"blocks\.0\.layer is in two units"),
    ],
)
def test_what_cannot_be_sharded_is_one_line(create: Callable[[], nn.Module], message: str) -> None:
    workload = other(create)
    with pytest.raises(UsageError, match=message) as raised:
        sharding.units_of(workload, workload.create_model())
    assert "\n" not in str(raised.value)
