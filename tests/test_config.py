import dataclasses

import pytest

from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser
from mnist_ray.mnist import MNIST
from mnist_ray.settings import build, names_of


def test_every_default_passes_its_own_check() -> None:
    for config_class in (TrainConfig, WorkerConfig, OutputConfig):
        assert build(config_class, dataclasses.asdict(config_class())) == config_class()


def test_the_notebook_recipe_names_only_settings_that_exist() -> None:
    assert MNIST.recipes["notebook"].keys() <= {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": -1}, "--num-workers must be at least 0, not -1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"num_epochs": -1}, "--num-epochs must be at least 1"),
        ({"learning_rate": -0.1}, "--learning-rate must be a positive number"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a positive number"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a positive number"),
        ({"validation_size": -1}, "--validation-size must be at least 0"),
        ({"beta1": 1.0}, "--beta1 must be in"),
        ({"precision": "fp8"}, "--precision must be one of auto, fp32, bf16, fp16"),
        ({"batch_size": "64"}, "--batch-size must be of type int"),
        ({"batch_size": True}, "--batch-size must be of type int"),
        ({"seed": None}, "--seed must be of type int"),
        ({"run_name": "../elsewhere"}, "--run-name must be letters"),
        ({"run_name": ""}, "--run-name must be letters"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, object], message: str) -> None:
    (name,) = values
    (config_class,) = (some for some in (TrainConfig, WorkerConfig, OutputConfig) if name in names_of([some]))
    with pytest.raises(UsageError) as raised:
        build(config_class, values)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-workers", "1"], {"num_workers": 1}),
        (["--num-workers", "4", "--min-workers", "3"], {"num_workers": 4, "min_workers": 3}),
        ([], {}),
    ],
)
def test_a_number_of_workers_may_be_a_range(
    flags: list[str], expected: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    assert Parser("", WorkerConfig).read_flags() == expected
