from __future__ import annotations

import pytest

from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.flags import Parser, peek


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--epochs", "3"], "unrecognized arguments: --epochs 3; did you mean --num-epochs?"),
        (["--learning_rate", "0.1"], "unrecognized arguments: --learning_rate 0.1; did you mean --learning-rate?"),
        (["--quiet", "--workers=2"], "unrecognized arguments: --workers=2; did you mean --num-workers?"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_flag_that_is_almost_one_names_the_one_that_is_meant(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", TrainConfig, WorkerConfig, OutputConfig).read_flags(wrong)
    assert capsys.readouterr().err.endswith(f": error: {said}; see --help\n")


def test_only_flags_that_are_given_are_returned() -> None:
    given = Parser("", WorkerConfig).read_flags(["--num-workers", "4", "--autoscaling"])
    assert given == {"num_workers": 4, "autoscaling": True}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("RUN --width 64", "RUN"),
        ("--num-tasks 4 RUN --width 64", "RUN"),
        ("--width 64 RUN", "RUN"),
        ("--width=64 RUN", "RUN"),
        ("--storage-path s --num-tasks=4 RUN", "RUN"),
        ("--augment RUN --width 64", "RUN"),
        ("--num-tasks 4", None),
    ],
)
def test_a_runs_name_is_found_among_flags_that_are_not_all_known_yet(
    line: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line.split()])
    assert peek("num_tasks", "storage_path", "workload")[1] == found
