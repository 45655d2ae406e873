import dataclasses

import pytest

from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.mnist import MNIST
from mnist_ray.settings import build, names_of

CLASSES = (TrainConfig, WorkerConfig, OutputConfig)


def test_every_default_passes_its_own_check() -> None:
    for config_class in CLASSES:
        assert build(config_class, dataclasses.asdict(config_class())) == config_class()


def test_the_notebook_recipe_names_only_settings_that_exist() -> None:
    assert MNIST.recipes["notebook"].keys() <= names_of([TrainConfig])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_workers", -1, "--num-workers must be at least 0, not -1"),
        ("learning_rate", float("inf"), "--learning-rate must be a positive number, not inf"),
        ("beta1", 1.0, "--beta1 must be in [0, 1), not 1.0"),
        ("limit", 0.0, "--limit must be above 0, and at most 1, not 0.0"),
        ("seed", 2**31, "--seed must be 0 to 2,147,483,647, not 2147483648"),
        ("precision", "fp8", "--precision must be one of auto, fp32, bf16, fp16, not 'fp8'"),
        ("run_name", "../elsewhere", "--run-name must be letters, digits, '.', '_' or '-', not '../elsewhere'"),
        ("run_name", "", "--run-name must be letters, digits, '.', '_' or '-', not ''"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object, message: str) -> None:
    (config_class,) = (some for some in CLASSES if name in names_of([some]))
    with pytest.raises(UsageError) as raised:
        build(config_class, {name: value})
    assert str(raised.value) == message
