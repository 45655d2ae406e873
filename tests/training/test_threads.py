import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.parallel.group import Group
from mnist_ray.training.state import TrainingState
from mnist_ray.training.timing import is_one_thread_enough

TABLE = Split(Arrays(np.zeros((500, 54), np.float32), np.zeros(500)))


@pytest.mark.parametrize(
    ("width", "batch_size", "world_size", "expected"),
    [
        (64, 100, 1, True),
        (64, 2_000, 1, False),
        (64, 2_000, 4, True),
        (8192, 100, 1, False),
    ],
)
def test_one_thread_is_enough_for_few_weights_and_small_slices(
    width: int, batch_size: int, world_size: int, expected: bool
) -> None:
    state, config = TrainingState(nn.Linear(54, width), {}, {}), TrainConfig(batch_size=batch_size)
    assert is_one_thread_enough(state, TABLE, config, Group(0, world_size)) == expected


def test_examples_that_are_read_one_by_one_keep_all_threads() -> None:
    state, examples = TrainingState(nn.Linear(1, 1), {}, {}), TensorDataset(torch.zeros(9, 1), torch.zeros(9))
    assert not is_one_thread_enough(state, Split(examples), TrainConfig(), Group())
