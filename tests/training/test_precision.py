from dataclasses import replace

import pytest
import torch

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.parallel.group import Group
from mnist_ray.training import step
from mnist_ray.training.timing import is_bf16_slow
from mnist_ray.training.trainer import create_state
from tests.conftest import mnist

CONFIG = TrainConfig(precision="bf16", batch_size=20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Seconds that the next passes take, by precision; the first one warms up."""
    now, seconds = [0.0], {"bf16": [9.0], "fp32": [0.0]}

    forward = step.forward

    def timed(*given: object) -> object:
        now[0] += seconds[str(given[3])].pop(0)
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "forward", timed)
    monkeypatch.setattr("mnist_ray.training.timing.time.thread_time", lambda: now[0])
    return seconds


def is_slow(images: Arrays, config: TrainConfig = CONFIG) -> bool:
    state = create_state(mnist(), config, len(images), Group())
    return is_bf16_slow(mnist(), state, Split(images), config, Group())


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"),
    [
        ([0.3, 0.2, 0.9], [0.1, 0.4, 0.4], True),
        ([0.3, 0.11, 0.9], [0.1, 0.4, 0.4], False),
        ([0.003, 0.003, 0.003], [0.001, 0.001, 0.001], False),
    ],
    ids=["slower", "an outlier", "too short to matter"],
)
def test_bf16_is_slow_if_its_fastest_pass_takes_much_longer(
    bf16: list[float], fp32: list[float], expected: bool, few_images: Arrays, clock: dict[str, list[float]]
) -> None:
    clock["bf16"] += bf16
    clock["fp32"] += fp32
    num_threads = torch.get_num_threads()
    assert is_slow(few_images) == expected
    assert clock == {"bf16": [], "fp32": []}
    assert torch.get_num_threads() == num_threads


def test_the_threads_are_restored_if_a_pass_fails(few_images: Arrays, clock: dict[str, list[float]]) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    clock["bf16"] = []
    with pytest.raises(IndexError):
        is_slow(few_images)
    found = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    assert found == 2


def test_reproducible_runs_do_not_depend_on_a_clock(few_images: Arrays, clock: dict[str, list[float]]) -> None:
    assert not is_slow(few_images, replace(CONFIG, reproducible=True))
    assert clock["bf16"] == [9.0], "nothing is measured"
