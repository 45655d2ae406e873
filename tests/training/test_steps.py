"""Trainings by steps in place of passes over the data: ``--num-steps`` and ``--validate-every``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mnist_ray.checkpoints import checkpoint
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Blocks, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.errors import UsageError
from mnist_ray.job.job import read_job
from mnist_ray.parallel.group import Group
from mnist_ray.storage import RunFolder, checkpoint_name, locate
from mnist_ray.training.events import Progress
from mnist_ray.training.state import StopWantedError, TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Workload
from tests.conftest import ROOT
from tests.ranks import Hooks, call_on_ranks, joined

GPT = str(ROOT / "examples" / "gpt.py")
NUMBERS = np.arange(50, dtype=np.float32)[:, np.newaxis]
# 5 steps a pass of 50 examples; epochs of 4 steps, the last one of 1
CONFIG = TrainConfig(
    precision="fp32",
    batch_size=11,
    learning_rate=0.01,
    lr_schedule="linear",
    num_steps=13,
    validate_every=4,
    num_epochs=4,
    num_chunks=3,
    num_streams=3,
)
ALONE = Group()


class Numbers(Workload):
    """What is a number? Notes the numbers that are seen in training."""

    def create_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def prepare(self, inputs: Tensor, generator: Any) -> Tensor:
        if generator is not None:
            SEEN.append(sorted(inputs[:, 0].int().tolist()))
        return inputs / 50

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets / 50) ** 2


SEEN: list[list[int]] = []  # by step


class Examples(Dataset):
    def __len__(self) -> int:
        return len(NUMBERS)

    def __getitem__(self, place: int) -> tuple[np.ndarray, float]:
        return NUMBERS[place], float(NUMBERS[place, 0])


class InBlocks(Blocks):
    sizes = (20, 10, 20)

    def read(self, number: int) -> Arrays:
        start = sum(self.sizes[:number])
        rows = NUMBERS[start : start + self.sizes[number]]
        return Arrays(rows, rows[:, 0])


KINDS: dict[str, Any] = {"arrays": Arrays(NUMBERS, NUMBERS[:, 0]), "examples": Examples(), "blocks": InBlocks()}


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()


def trained(kind: str, run: RunFolder | None = None, stop_after: int = -1, group: Group = ALONE) -> TrainingState:
    """Train, from the run's last checkpoint if it has one, with a checkpoint after each step."""
    split = Split(KINDS[kind])
    state = create_state(Numbers(), CONFIG, len(split), group)
    if run is not None:
        checkpoint.restore_newest(run, state)

    def save(state: TrainingState, progress: Progress) -> None:
        if run is not None and group.rank == 0:
            checkpoint.snapshot(state, {}).write(run.inside(checkpoint_name(state.epoch, state.step)))

    state.last_step = stop_after
    hooks = Hooks(on_checkpoint=save)
    try:
        Trainer(Numbers(), state, split, replace(CONFIG, checkpoint_every=1), group, [hooks]).train()
    except StopWantedError:
        assert state.total_step == stop_after
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_by_steps_goes_through_whole_passes(kind: str) -> None:
    state = trained(kind)
    assert len(SEEN) == 13
    assert [len(batch) for batch in SEEN] == [11, 11, 11, 11, 6, 11, 11, 11, 11, 6, 11, 11, 11]
    for first in (0, 5):
        assert sorted(number for batch in SEEN[first : first + 5] for number in batch) == list(range(50))
    assert SEEN[0] != SEEN[5], "each pass has an order of its own"
    assert (state.epoch, state.step) == (4, 0)
    assert state.schedulers[""].last_epoch == 13
    assert state.schedulers[""].get_last_lr()[0] < 0.1 * CONFIG.learning_rate, "the schedule spans the steps"


def test_the_batches_are_those_of_the_passes_orders() -> None:
    trained("arrays")
    samplers = [ShardedBatchSampler(50, 11, seed=CONFIG.seed, pass_number=number) for number in range(3)]
    expected = [sorted(request.indices.tolist()) for sampler in samplers for request in sampler]
    assert expected[:13] == SEEN


STOPS, WORLDS = (1, 4, 6, 12), ((1, 1), (1, 3), (3, 2))


def _train_in_two_parts(rank: int, folder: Path) -> None:
    """Stop at each of STOPS, and resume with another number of ranks; write down what this rank saw in either part."""
    for kind in KINDS:
        for stop_after in STOPS:
            for worlds in WORLDS:
                run = locate(str(folder), f"{kind}-{stop_after}-{worlds[0]}-{worlds[1]}")
                for part, world_size in enumerate(worlds):
                    if rank < world_size:
                        with joined(rank, world_size, folder / f"store-{run.name}-{part}") as group:
                            trained(kind, run, -1 if part else stop_after, group)
                        (folder / f"{run.name}.{part}.{rank}.json").write_text(json.dumps(SEEN))
                        SEEN.clear()


@pytest.fixture(scope="module")
def in_two_parts(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of ``_train_in_two_parts`` saw, and their checkpoints."""
    folder = tmp_path_factory.mktemp("parts")
    call_on_ranks(ranks, _train_in_two_parts, folder)
    return folder


@pytest.mark.parametrize("worlds", WORLDS)
@pytest.mark.parametrize("stop_after", STOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_stops_at_any_step_goes_on_with_any_number_of_workers_and_the_same_batches(
    kind: str, stop_after: int, worlds: tuple[int, int], in_two_parts: Path
) -> None:
    name, seen = f"{kind}-{stop_after}-{worlds[0]}-{worlds[1]}", []
    whole = trained(kind).model.state_dict()
    for part, world_size in enumerate(worlds):
        of_ranks = [json.loads((in_two_parts / f"{name}.{part}.{rank}.json").read_text()) for rank in range(world_size)]
        seen += [sorted(itertools.chain(*slices)) for slices in zip(*of_ranks, strict=True)]
    assert seen == SEEN
    state = create_state(Numbers(), CONFIG, len(NUMBERS), Group())
    checkpoint.restore_newest(locate(str(in_two_parts), name), state)
    assert (state.epoch, state.step) == (4, 0)
    tolerance = 0.0 if worlds == (1, 1) else 1e-5
    for key, value in state.model.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=tolerance, atol=0.1 * tolerance)


def test_epochs_end_and_progress_counts_by_the_given_steps() -> None:
    split, ends, last = Split(KINDS["arrays"]), list[int](), list[Progress]()
    state = create_state(Numbers(), CONFIG, len(split), Group())

    def note(state: TrainingState, progress: Progress) -> None:
        ends.append(progress.step)
        last.append(progress)

    Trainer(Numbers(), state, split, CONFIG, Group(), [Hooks(on_epoch=note)]).train()
    assert ends == [4, 4, 4, 1]
    assert [progress.epoch_steps for progress in last] == [4, 4, 4, 1]
    assert last[0].num_examples == 44
    assert [progress.total_step for progress in last] == [4, 8, 12, 13]
    assert state.total_step == 13


def read(**given: Any) -> TrainConfig:
    return read_job({"run_name": "none", "storage_path": "/nowhere", **given}).train


def test_settings_of_steps_decide_the_epochs() -> None:
    config = read(num_steps=1000, validate_every=300)
    assert (config.num_epochs, config.steps_per_epoch(10), config.total_steps(10)) == (4, 300, 1000)
    config = read(num_steps=1005)
    assert (config.num_epochs, config.validate_every) == (10, 101)
    assert read(num_steps=5, validate_every=300).validate_every == 5


def test_the_epochs_of_a_stronger_place_do_not_go_unused_beside_a_recipes_steps(tmp_path: Path) -> None:
    (tmp_path / "three.toml").write_text("num_epochs = 3")
    more: dict[str, Any]
    for more in ({"num_epochs": 3}, {"config": tmp_path / "three.toml"}):
        with pytest.raises(UsageError, match=r"^--num-steps 1000 replaces --num-epochs .*, or add --num-steps none$"):
            read(workload=GPT, **more)


def test_epochs_may_be_given_in_place_of_a_recipes_steps() -> None:
    assert read(workload=GPT, num_epochs=3, num_steps=None).num_epochs == 3
