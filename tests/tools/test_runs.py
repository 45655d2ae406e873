import json
import os
import shutil
from pathlib import Path

import pytest

from mnist_ray import cli
from mnist_ray.errors import UsageError
from mnist_ray.job.lease import owned
from mnist_ray.text import VERSION
from tests.conftest import close, folder_at, run_main


@pytest.fixture
def storage(finished_run: Path, tmp_path: Path) -> Path:
    """Runs: one finished, one interrupted in its first epoch, one damaged; a sweep; and a folder that is no run."""
    for name in ("finished", "interrupted", "damaged"):
        shutil.copytree(finished_run, tmp_path / name)
    (tmp_path / "interrupted" / "result.json").unlink()
    (tmp_path / "damaged" / "result.json").write_text("[]")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "config.json").write_text('{"num_trials": 4}')
    (tmp_path / "no_run").mkdir()
    for age, name in enumerate(("sweep", "damaged", "interrupted", "finished")):
        os.utime(tmp_path / name / "config.json", (10**9 - age, 10**9 - age))
    return tmp_path


def test_runs_are_listed_with_state_metrics_and_how_to_resume(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("runs", "--storage-path", str(storage))
    head, *rows, resume_sweep, resume, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "kind", "state", "progress", "about", "age"]
    assert [row.split()[:3] for row in rows[:3:2]] == [
        ["sweep", "tune", "unfinished"],
        ["interrupted", "train", "unfinished"],
    ]
    assert rows[1].split()[:3] == ["damaged", "train", "damaged"]
    assert "result.json is damaged: " in rows[1]
    assert rows[3].split()[:5] == ["finished", "train", "finished", "epoch", "2/2"]
    assert "test_accuracy " in rows[3]
    assert "val_accuracy " in rows[2]
    where = f"--run-name interrupted --storage-path {storage}"
    assert resume == f"to resume interrupted: mnist-ray train --resume {where}"
    assert resume_sweep.startswith("to resume sweep: mnist-ray tune --resume")
    assert last == f"4 runs of 4 in {storage}"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--where", "batch_size=50"), ["interrupted", "better", "finished"]),
        (("--where", "batch_size=50", "--where", "learning_rate=1e-2"), []),
        (("--sort", "accuracy", "--count", "2"), ["better", "finished"]),
        (("--sort", "test_loss:max", "--count", "1"), ["better"]),
        (("--sort", "loss", "--where", "num_epochs=2"), ["finished", "interrupted", "better"]),
    ],
)
def test_runs_are_chosen_by_settings_and_sorted_by_a_metric_best_first(
    flags: tuple[str, ...], names: list[str], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(storage / "finished", storage / "better")
    result = json.loads((storage / "better" / "result.json").read_text())
    (storage / "better" / "result.json").write_text(json.dumps({**result, "test_accuracy": 1.0, "test_loss": 9.0}))
    (storage / "damaged" / "config.json").write_text("[]")
    os.utime(storage / "better" / "config.json", (10**9 - 3, 10**9 - 3))
    run_main("runs", "--storage-path", str(storage), "--json", *flags)
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in listed][: len(names)] == names
    assert names or not listed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--where", "batch_siz=50"), "--where: no run has a setting batch_siz; did you mean batch_size?"),
        (("--where", "batch_size"), "--where batch_size must be NAME=VALUE"),
        (("--sort", "test_acuracy"), "--sort test_acuracy: no run has this metric; did you mean test_accuracy?"),
        (("--sort", "accuracy:best"), "--sort accuracy:best: write NAME:min or NAME:max"),
    ],
)
def test_a_setting_or_metric_that_no_run_has_is_one_line(flags: tuple[str, ...], said: str, storage: Path) -> None:
    with pytest.raises(UsageError) as raised:
        run_main("runs", "--storage-path", str(storage), *flags)
    assert str(raised.value) == said


def test_a_storage_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="nowhere does not exist; name the folder or URI of your runs with --storage-path"
    ):
        run_main("runs", "--storage-path", str(tmp_path / "nowhere"))


def test_a_run_that_a_job_owns_is_running_and_json_lists_the_newest(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with owned(folder_at(storage / "interrupted")):
        run_main("runs", "--storage-path", str(storage), "--json", "--count", "3")
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in listed] == ["sweep", "damaged", "interrupted"]
    assert listed[2]["state"].startswith("running on ")
    assert listed[2]["resume_with"] == ""
    assert 0 <= listed[2]["metrics"]["val_accuracy"] <= 1


def test_a_folder_that_cannot_be_read_does_not_end_the_list(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir(os.fsencode(storage) + b"/not utf-8 \xff")
    (storage / "interrupted" / "result.json").mkdir()
    close(monkeypatch, "finished")
    run_main("runs", "--storage-path", str(storage), "--json")
    listed = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: run["state"] for name, run in listed.items()} == {
        "sweep": "unfinished",
        "damaged": "damaged",
        "interrupted": "damaged",
    }
    assert "cannot read " in listed["interrupted"]["about"]


def test_the_program_has_its_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mnist-ray", "--version"])
    with pytest.raises(SystemExit):
        cli.program()
    assert capsys.readouterr().out == f"mnist-ray {VERSION}\n"
