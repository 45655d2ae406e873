import dataclasses
import json
from pathlib import Path

import pytest

from mnist_ray import cli, config
from mnist_ray.config import RUN_SETTINGS, DataConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError


def test_flags_override_the_config_file_which_overrides_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"batch_size": 16, "learning_rate": 0.5}))
    values = config.chosen_values({"recipe": "notebook", "config": str(file), "learning_rate": 0.25})
    job = config.build_job(values)
    assert (job.train.batch_size, job.train.learning_rate, job.train.precision) == (16, 0.25, "fp32")


def test_a_written_config_is_accepted_back(tmp_path: Path) -> None:
    job = config.build_job({"batch_size": 7, "learning_rate": 0.1 + 0.2, "data_dir": "/x", "num_workers": 3})
    file = tmp_path / "config.json"
    file.write_text(config.to_json(job))
    again = config.build_job(config.chosen_values({"config": str(file)}))
    assert again == job


def test_every_default_passes_its_own_check() -> None:
    defaults = dataclasses.asdict(config.build_job({}).train)
    assert config.build(TrainConfig, defaults) == TrainConfig()


def test_the_notebook_recipe_names_only_settings_that_exist() -> None:
    assert config.RECIPES["notebook"].keys() <= {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, "--num-workers must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"num_epochs": -1}, "--num-epochs must be at least 1"),
        ({"learning_rate": -0.1}, "--learning-rate must be a positive number"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a positive number"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a positive number"),
        ({"validation_size": -1}, "--validation-size must be at least 0"),
        ({"beta1": 1.0}, "--beta1 must be in"),
        ({"precision": "fp16"}, "--precision must be one of auto, fp32, bf16"),
        ({"batch_size": "64"}, "--batch-size must be of type int"),
        ({"batch_size": True}, "--batch-size must be of type int"),
        ({"seed": None}, "--seed must be of type int"),
        ({"run_name": "../elsewhere"}, "--run-name must be letters"),
        ({"run_name": ""}, "--run-name must be letters"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        config.build_job(values)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"batchsize": 1, "lr": 2}', "unknown settings: batchsize, lr"),
        ('{"run_name": "x"}', "unknown settings: run_name"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        config.read_config_file(str(file), RUN_SETTINGS)


def test_a_missing_config_file_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot read the config file /nowhere: No such file"):
        config.read_config_file("/nowhere", RUN_SETTINGS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation_size": 100}, "--validation-size 100 leaves nothing to train on"),
        ({"validation_size": 60, "batch_size": 41}, "--batch-size 41 is larger than the 40 images"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.check_fits(config.build(TrainConfig, values), num_train=100)


def test_settings_that_just_fit_the_data_are_taken() -> None:
    config.check_fits(config.build(TrainConfig, {"validation_size": 60, "batch_size": 40}), num_train=100)


def test_a_data_folder_is_kept_as_it_can_be_read_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.chosen_values({"data_dir": "mine"})["data_dir"] == str(tmp_path / "mine")


def test_a_data_set_by_name_takes_the_place_of_a_saved_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config.to_json(config.build_job({"data_dir": "/x", "num_workers": 4, "min_workers": 2})))
    values = config.chosen_values({"config": str(file), "dataset": "kmnist"})
    assert config.build_job(values).data == DataConfig(dataset="kmnist")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-workers", "1"], {"num_workers": 1, "min_workers": None}),
        (["--num-workers", "2:4"], {"num_workers": 4, "min_workers": 2}),
        (["--num-workers", "4", "--min-workers", "3"], {"num_workers": 4, "min_workers": 3}),
        ([], {}),
    ],
)
def test_a_number_of_workers_takes_the_place_of_a_saved_range(
    flags: list[str], expected: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    assert cli.Parser("", WorkerConfig).read_flags() == expected


def test_a_second_ctrl_c_does_not_hide_what_the_first_had_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt("interrupted; to go on: …")
        finally:
            raise KeyboardInterrupt

    assert cli._status_of(main) == 130
    assert capsys.readouterr().err == "interrupted; to go on: …\n"
