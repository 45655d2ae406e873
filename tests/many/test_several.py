"""Jobs of several runs: --num-seeds and --folds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_ray import Run, evaluate, load_run, train
from mnist_ray.errors import TrainingStoppedError
from mnist_ray.report.columns import read_columns
from mnist_ray.report.intervals import t_quantile
from tests.conftest import callback_at

WORKLOAD = '''
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Points(Classification):
    """Points on both sides of a line, with some labels wrong."""

    recipes = {"default": {"num_epochs": 2, "batch_size": 10, "learning_rate": 0.05, "precision": "fp32"}}

    def load_data(self):
        random = np.random.default_rng(0)
        inputs = random.normal(size=(150, 2)).astype(np.float32)
        targets = (inputs @ [1, 2] + random.normal(size=150) > 0).astype(np.uint8)
        return Data(Arrays(inputs[:120], targets[:120]), Arrays(inputs[120:], targets[120:]))

    def create_model(self):
        return nn.Linear(2, 2)

class Alone(Points):
    """One fold of the points, divided by hand: the places in ALONE are the test set."""

    def load_data(self):
        data = super().load_data().train
        is_test = np.isin(np.arange(120), np.load(__file__ + ".npy"))
        return Data(Arrays(*data[~is_test]), Arrays(*data[is_test]))
'''


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("points") / "points.py"
    file.write_text(WORKLOAD)
    return file


@pytest.fixture(scope="module")
def where(points: Path) -> dict[str, Any]:
    return {"workload": f"{points}:Points", "storage_path": points.parent / "runs", "quiet": True}


@pytest.fixture(scope="module")
def crossed(where: dict[str, Any], ray_address: str) -> Run:
    """Three folds, each with two seeds."""
    return train(**where, folds=3, num_seeds=2, run_name="crossed")


def digest(run: Run) -> str:
    return str(run.result["weights_sha256"])


def test_a_member_has_the_weights_of_its_run_alone_and_a_job_those_of_its_config(
    crossed: Run, where: dict[str, Any], tmp_path: Path
) -> None:
    member = load_run(f"{crossed.folder.uri}/members/seed-1_fold-2")
    alone = train(**where, folds=3, fold=2, seed=1, num_workers=0, cpus_per_worker=1)
    again = train(config=f"{member.folder.path}/config.json", storage_path=where["storage_path"], quiet=True)
    assert digest(alone) == digest(member) == digest(again)
    assert alone.metrics == member.metrics
    whole = train(config=f"{crossed.folder.path}/config.json", storage_path=tmp_path)
    assert [digest(run) for run in (whole, *whole.members)] == [digest(run) for run in (crossed, *crossed.members)]


def test_a_member_has_the_weights_of_a_run_on_the_same_examples_divided_by_hand(
    crossed: Run, where: dict[str, Any], points: Path
) -> None:
    member = crossed.members[0]
    np.save(f"{points}.npy", read_columns(member.folder)["index"])
    alone = train(**{**where, "workload": f"{points}:Alone"}, num_workers=0, cpus_per_worker=1)
    assert digest(alone) == digest(member)
    assert alone.metrics == member.metrics


def test_every_example_is_predicted_once_by_a_run_that_has_not_seen_it(crossed: Run) -> None:
    columns, labels = read_columns(crossed.folder), read_columns(crossed.folder)["label"]
    assert [*columns][:3] == ["fold", "index", "loss"]
    assert columns["index"].tolist() == [*range(120)]
    for fold, member in enumerate(crossed.members[:3], 1):
        own = read_columns(member.folder)
        assert np.array_equal(np.flatnonzero(columns["fold"] == fold), own["index"])
        assert np.array_equal(columns["probabilities"][own["index"]], own["probabilities"])
        assert abs(labels[own["index"]].mean() - labels.mean()) < 0.02, "classes have their shares"
    assert sum(map(sum, crossed.result["confusion_matrix"])) == 120


def test_the_result_has_means_and_the_interval_of_folds_that_overlap(crossed: Run) -> None:
    spread = crossed.result["spread"]["test_accuracy"]
    values = [member.metrics["accuracy"] for member in crossed.members]
    assert (len(values), spread["values"]) == (6, values)
    half = t_quantile(5) * math.sqrt((1 / 6 + 1 / 2) * np.var(values, ddof=1))
    assert spread["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert crossed.metrics["accuracy"] == pytest.approx(np.mean(values))


def test_the_kept_run_is_the_best_by_validation_and_the_report_has_a_row_for_each(crossed: Run) -> None:
    scores = [member.result["checkpoint_metrics"]["val_score"] for member in crossed.members]
    best = crossed.members[scores.index(max(scores))]
    assert crossed.checkpoint == best.checkpoint
    assert evaluate(crossed) == evaluate(best)
    page = crossed.folder.read_text("report.html") or ""
    assert "finished: 6 of 6 runs, tested on 120" in page
    assert page.count("<td>done") == 6
    assert "mean accuracy, 95 %" in page


def test_a_resumed_job_keeps_its_finished_runs_and_trains_the_others(
    crossed: Run, where: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(crossed.folder.path, tmp_path / "crossed")
    for lost in ("result.json", "members/seed-0_fold-3/result.json"):
        (tmp_path / "crossed" / lost).unlink()
    shutil.rmtree(tmp_path / "crossed" / "members" / "seed-1_fold-1")
    table = tmp_path / "crossed" / "members.csv"
    left = [line for line in table.read_text().splitlines() if "seed-1_fold-1" not in line]
    left = [line.replace(",done", ",running") if "seed-0_fold-3" in line else line for line in left]
    table.write_text("\n".join(left))
    before = (tmp_path / "crossed/members/seed-0_fold-1/result.json").stat().st_mtime_ns
    again = train(where["workload"], storage_path=tmp_path, run_name="crossed", resume=True)
    said = capsys.readouterr().out
    assert "at a time  2 runs" in said
    assert said.count(" after 2/2 epochs, done · ") == 2
    assert again.result["spread"] == crossed.result["spread"]
    assert [digest(member) for member in again.members] == [digest(member) for member in crossed.members]
    assert (tmp_path / "crossed/members/seed-0_fold-1/result.json").stat().st_mtime_ns == before


def test_a_run_whose_process_dies_continues(
    where: dict[str, Any], ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    died = tmp_path / "died"
    die = f"    if state.total_step == 15: open({str(died)!r}, 'x'); os._exit(1)"  # only the first run that comes here
    once = "try:", die, "except FileExistsError:", "    pass"
    dies = callback_at(tmp_path / "dies.py", "on_step(self, state)", *once)
    settings = {**where, "quiet": False, "num_seeds": 2}
    found = train(**settings, callback=str(dies))
    assert capsys.readouterr().out.count("it continues from its last checkpoint") == 1
    assert [digest(run) for run in found.members] == [digest(run) for run in train(**settings).members]


def test_an_error_names_the_run(where: dict[str, Any], ray_address: str, tmp_path: Path) -> None:
    fails = callback_at(tmp_path / "fails.py", "on_start(self, state, group)", "1 / 0")
    with pytest.raises(TrainingStoppedError, match=r"^seed [01]: ZeroDivisionError: .*\(fails\.py, line \d+\)"):
        train(**where, num_seeds=2, callback=str(fails))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeds_train_also_without_ray_and_with_several_workers_and_without_validation(
    where: dict[str, Any], ray_address: str, num_workers: int
) -> None:
    same = {**where, "num_workers": num_workers, "validation_size": 0}
    several = train(**same, num_seeds=2, seed=5)
    alone = train(**same, seed=6, cpus_per_worker=1)
    assert [run.name for run in several.members] == ["seed-5", "seed-6"]
    assert digest(several.members[1]) == digest(alone)
    assert several.result["num_test_examples"] == 30
