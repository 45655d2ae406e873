from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.data import Arrays, Split
from mnist_ray.parallel.group import Group
from mnist_ray.training.timing import is_one_thread_faster
from mnist_ray.training.trainer import create_state
from tests.conftest import mnist

CONFIG = TrainConfig(precision="fp32", batch_size=20)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choice(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], split: Split, config: TrainConfig = CONFIG
) -> tuple[bool, set[int]]:
    """Return the choice if a pass takes ``seconds`` by the number of threads, and the sizes of the slices tried."""
    now, sizes = [0.0], set[int]()

    def batch_loss(model: nn.Module, batch: MicroBatch, step: object) -> Tensor:
        now[0] += seconds[torch.get_num_threads()]
        sizes.add(len(batch.targets))
        return next(model.parameters()).sum().expand(len(batch.targets))

    monkeypatch.setattr("mnist_ray.training.timing.time.perf_counter", lambda: now[0])
    workload = mnist()
    monkeypatch.setattr(workload, "batch_loss", batch_loss)
    state = create_state(workload, config, len(split), Group())
    return is_one_thread_faster(workload, state, split, config, Group()), sizes


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("alone", "together", "expected"),
    [(2e-4, 3e-4, True), (2e-4, 1e-4, False), (2e-3, 3e-3, False), (1.0, 2.0, False)],
)
def test_a_step_below_a_millisecond_has_one_thread_if_two_take_as_long(
    alone: float, together: float, expected: bool, few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {1: alone, 2: together}
    assert choice(monkeypatch, seconds, Split(few_images)) == (expected, {20})
    assert choice(monkeypatch, seconds, Split(few_images), replace(CONFIG, micro_batch_size=7)) == (expected, {7})
    assert torch.get_num_threads() == 2


class Images(Dataset):
    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> object:
        return self.arrays[index]


@pytest.mark.usefixtures("two_threads")
def test_nothing_is_timed_where_a_step_cannot_be_short(few_images: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 2e-4, 2: 3e-4}
    assert choice(monkeypatch, seconds, Split(Images(few_images))) == (False, set())
    assert choice(monkeypatch, seconds, Split(few_images), replace(CONFIG, compile=True)) == (False, set())
    monkeypatch.setattr("mnist_ray.training.timing._MAX_SMALL_BYTES", 10)
    assert choice(monkeypatch, seconds, Split(few_images)) == (False, set())
    monkeypatch.setattr("mnist_ray.training.timing._MAX_SMALL_BYTES", 2**24)
    monkeypatch.setattr("mnist_ray.training.timing.torch.get_num_threads", Mock(return_value=1))
    assert choice(monkeypatch, seconds, Split(few_images)) == (False, set())
