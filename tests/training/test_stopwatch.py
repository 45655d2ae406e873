"""Where a worker's time goes, and when checkpoints within an epoch are saved."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import UsageError
from mnist_ray.job.job import read_job
from mnist_ray.parallel.group import Group
from mnist_ray.training.state import TrainingState
from mnist_ray.training.stopwatch import CALLBACKS, COMPUTE, DATA, PARTS, START, WORKERS, Stopwatch
from mnist_ray.training.trainer import Trainer, create_state
from tests.conftest import mnist
from tests.ranks import Hooks, call_on_ranks, joined

CONFIG = TrainConfig(precision="fp32", num_epochs=1, batch_size=8)
PAUSE_S = 0.02


class ByHand(Stopwatch):
    """A stopwatch whose time is set by hand."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def go(self, seconds: float, part: str) -> None:
        self.time += seconds
        self.turn(part)


def seconds_of(watch: Stopwatch) -> dict[str, float]:
    return {part: value for part, value in zip(PARTS, watch.taken(), strict=True) if value}


def test_each_moment_belongs_to_one_part() -> None:
    watch = ByHand()
    watch.go(1, DATA)
    watch.go(2, COMPUTE)
    watch.go(4, DATA)
    watch.go(8, COMPUTE)
    watch.time += 16  # not over yet
    assert seconds_of(watch) == {START: 1, DATA: 10, COMPUTE: 4}
    watch.go(32, DATA)
    assert seconds_of(watch) == {COMPUTE: 48}


def test_a_block_goes_back_to_the_part_before() -> None:
    watch = ByHand()
    watch.turn(COMPUTE)
    with watch.on(CALLBACKS):
        watch.time += 1
    with contextlib.suppress(ValueError), watch.on(CALLBACKS):
        watch.time += 1
        raise ValueError
    watch.go(2, DATA)
    assert seconds_of(watch) == {CALLBACKS: 2, COMPUTE: 2}


def test_all_up_to_the_first_step_is_the_start() -> None:
    watch = ByHand()
    watch.go(1, DATA)
    watch.go(2, COMPUTE)
    watch.end_start()
    watch.go(4, DATA)
    watch.end_start()
    assert seconds_of(watch) == {START: 3, COMPUTE: 4}


class Slow(Dataset):
    """Examples, each of which takes a second to read."""

    def __init__(self, arrays: Arrays, watch: ByHand) -> None:
        self._arrays, self._watch = arrays, watch

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        self._watch.time += 1
        return self._arrays[place][0], int(self._arrays[place][1])


def test_a_slow_data_set_and_a_slow_callback_have_parts_of_their_own(few_images: Arrays) -> None:
    watch = ByHand()
    split, workload, seconds = Split(Slow(few_images, watch)), mnist(), list[float]()

    def call(state: TrainingState) -> None:
        watch.time += 100

    hooks = Hooks(on_gradients=call, on_progress=lambda state, progress: seconds.extend(progress.parts[0]))
    state = create_state(workload, CONFIG, len(split), Group())
    state.watch = watch
    Trainer(workload, state, split, CONFIG, Group(), [hooks]).train()
    spent = {part: value for part, value in zip(PARTS, seconds, strict=True) if value}
    assert spent == {START: 8 + 100, DATA: 2 * 8, CALLBACKS: 2 * 100}, "of three steps, the first is part of the start"


def _note_waiting(rank: int, images: Arrays, folder: Path) -> None:
    """Train with two ranks, of which the second is slow; write down where the time of the first goes."""
    if rank < 2:
        seconds = torch.zeros(len(PARTS))
        hooks = Hooks(on_progress=lambda state, progress: seconds.add_(torch.tensor(progress.parts[0])))
        if rank == 1:
            hooks.on_step = lambda state: time.sleep(PAUSE_S)  # type: ignore[method-assign]
        with joined(rank, 2, folder / "store") as group:
            split, workload = Split(images), mnist()
            state = create_state(workload, CONFIG, len(split), group)
            Trainer(workload, state, split, CONFIG, group, [hooks]).train()
        (folder / f"{rank}.json").write_text(json.dumps(dict(zip(PARTS, seconds.tolist(), strict=True))))


def test_a_worker_waits_for_a_slower_one(ranks: ProcessPoolExecutor, few_images: Arrays, tmp_path: Path) -> None:
    call_on_ranks(ranks, _note_waiting, few_images, tmp_path)
    found = json.loads((tmp_path / "0.json").read_text())
    assert found[WORKERS] > 74 * PAUSE_S / 2


# --- checkpoints within an epoch


def weights_and_saves(images: Arrays, config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train for 75 steps of a second each; return the weights, and the steps at which a checkpoint was saved."""
    now, saves, workload, split = [0.0], list[int](), mnist(), Split(images)

    def pass_time(state: TrainingState) -> None:
        now[0] += 1.0

    hooks = Hooks(on_step=pass_time, on_checkpoint=lambda state, progress: saves.append(state.total_step))
    state = create_state(workload, config, len(split), Group())
    with mock.patch("mnist_ray.training.window.time", mock.Mock(perf_counter=lambda: now[0])):
        Trainer(workload, state, split, config, Group(), [hooks]).train()
    return state.model.state_dict(), saves


def test_checkpoints_are_saved_each_minute_and_change_no_weight(few_images: Arrays) -> None:
    expected, none = weights_and_saves(few_images, replace(CONFIG, checkpoint_every=10**6))
    assert none == [75], "the end of the epoch"
    found, saves = weights_and_saves(few_images, replace(CONFIG, checkpoint_every=None))
    assert saves == [61, 75]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_given_number_of_steps_must_be_one() -> None:
    given = {"run_name": "none", "storage_path": "/nowhere"}
    assert read_job(given).train.checkpoint_every is None
    with pytest.raises(UsageError, match="--checkpoint-every must be at least 1"):
        read_job({**given, "checkpoint_every": 0})
