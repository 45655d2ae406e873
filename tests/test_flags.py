from __future__ import annotations

import pytest

from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.flags import Parser, peek_word


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (["--epochs", "3"], "--num-epochs"),
        (["--num-epoch=3"], "--num-epochs"),
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


@pytest.mark.parametrize(
    "line",
    [
        "RUN --width 64",
        "--num-tasks 4 RUN --width 64",
        "--width 64 RUN",
        "--width=64 RUN",
        "--storage-path s --num-tasks=4 RUN",
        "--augment RUN --width 64",
    ],
)
def test_a_runs_name_is_found_among_flags_that_are_not_all_known_yet(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line.split()])
    assert peek_word("num_tasks", "storage_path", "workload") == "RUN"


def test_a_line_of_flags_names_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--num-tasks", "4"])
    assert peek_word("num_tasks", "storage_path", "workload") is None


def test_a_flag_that_is_like_no_other_is_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", TrainConfig).read_flags(["--frobnicate"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --frobnicate; see --help\n")
