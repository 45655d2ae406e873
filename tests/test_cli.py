from __future__ import annotations

import pytest

from mnist_ray.cli import Parser
from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (["--epochs", "3"], "--num-epochs"),
        (["--num-epoch=3"], "--num-epochs"),
        (["--lr", "0.1"], "--learning-rate"),
        (["--bs", "64"], "--batch-size"),
        (["--learning_rate", "0.1"], "--learning-rate"),
        (["--quiet", "--workers", "2"], "--num-workers"),
    ],
)
def test_a_flag_that_is_almost_one_names_the_one_that_is_meant(
    wrong: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", TrainConfig, WorkerConfig, OutputConfig).read_flags(wrong)
    assert f"; did you mean {meant}?; see --help\n" in capsys.readouterr().err


def test_a_flag_that_is_like_no_other_is_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", TrainConfig).read_flags(["--frobnicate"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --frobnicate; see --help\n")
