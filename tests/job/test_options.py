"""Runs with early stopping, callbacks, and few batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mnist_ray import train
from mnist_ray.report.run_files import read_csv
from mnist_ray.workload import Arrays, Data, Regression
from tests.conftest import Flags, callback_at, folder_at, run_main


@pytest.mark.usefixtures("ray_address")
def test_a_run_stops_early(quick: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"num_epochs": 9, "early_stopping_patience": 1, "ema_decay": 0.9, "optimizer": "sgd", "label_smoothing": 0.1}
    # At this rate the second epoch cannot be better than the first.
    more |= {"learning_rate": 1e-9, "limit": 0.5, "lr_schedule": "constant"}
    run_main("train", *quick(**more))
    said = capsys.readouterr().out
    assert "note       training stopped after epoch 2: validation was best after epoch 1" in said
    changed = (
        "optimizer sgd, label smoothing 0.1, ema decay 0.9, early stopping patience 1, validation size 600, limit 0.5"
    )
    assert f"settings   {changed}" in said
    assert "data       0.5 of " in said
    assert "1,200 images to train on, 300 for validation, 550 to test" in said
    assert "validation after epoch 1: " in said
    assert "testing    the checkpoint of epoch 1, the best by validation" in said
    epochs = read_csv(folder_at(tmp_path / "run"), "metrics.csv")
    assert [row["epoch"] for row in epochs if row["val_loss"]] == ["1", "2"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (tmp_path / "run" / result["checkpoint"] / "training.pt").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>early_stopping_patience</td><td>1 (default: None)</td>" in page


class Lost(Regression):
    """Its validation has nothing but NaN, its test has one."""

    def load_data(self) -> Data:
        zeros, one = Arrays(np.zeros((40, 1), np.float32), np.zeros(40)), np.where(np.arange(40) == 17, np.nan, 0)
        return Data(zeros, Arrays(zeros.inputs, one), validation=Arrays(zeros.inputs, np.full(40, np.nan)))

    def create_model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)


def test_a_run_with_nan_in_validation_and_test_ends_with_notes_that_name_the_first_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Lost, num_workers=0, num_epochs=2, storage_path=tmp_path, run_name="run")
    said = capsys.readouterr().out
    assert "note       rmse is NaN: the checkpoint of epoch 2 counts as the worst" in said
    assert "testing    the checkpoint of epoch 1, the first: rmse is NaN in each validation" in said
    note = "the loss is NaN or infinite for"
    assert said.count(f"note       {note} 40 of 40 examples; the first has index 0 in validation") == 2
    assert f"note       {note} 1 of 40 examples; the first has index 17 in test" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{note} 1 of 40" in page
    assert "39 predictions against their targets" in page


COUNTS = """
import torch
from mnist_ray.training.callback import Callback

class Counts(Callback):
    def __init__(self, num_ranks):
        self.found = torch.zeros(num_ranks)

    def on_start(self, state, group):
        self.rank = group.rank

    def state_dict(self):
        self.found[self.rank] = 1
        torch.distributed.all_reduce(self.found)  # never ends unless every rank calls it
        return {"num_ranks": int(self.found.count_nonzero())}
"""


@pytest.mark.usefixtures("ray_address")
def test_a_callback_that_a_flag_names_ends_a_run_of_two_workers_with_its_best_two_and_last_checkpoints(
    quick: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = callback_at(tmp_path / "ends.py", "on_epoch(self, state, progress)", "state.ends = state.epoch == 5")
    (tmp_path / "counts.py").write_text(COUNTS)
    flags = quick(num_epochs=9, num_workers=2, callback=callback)
    run_main("train", *flags, "--callback", f"{tmp_path}/counts.py:Counts(num_ranks=2)")
    assert "note       training stopped after epoch 5: validation was best after epoch " in capsys.readouterr().out
    run = tmp_path / "run"
    callbacks = [f"{callback}:Written", f"{tmp_path}/counts.py:Counts(num_ranks=2)"]
    assert json.loads((run / "config.json").read_text())["callback"] == callbacks
    assert torch.load(max(run.glob("checkpoint_epoch*")) / "training.pt")["callbacks"] == [{}, {"num_ranks": 2}]
    accuracy = {int(row["epoch"]): float(row["val_accuracy"]) for row in read_csv(folder_at(run), "metrics.csv")}
    assert list(accuracy) == [1, 2, 3, 4, 5]
    kept = {int(path.name[17:20]) for path in run.glob("checkpoint_epoch*")}
    assert max(accuracy) in kept
    best = sorted(accuracy.values())[-2:]
    assert sorted(accuracy[epoch] for epoch in kept)[-2:] == best
    assert len(kept) <= 3
    assert json.loads((run / "result.json").read_text())["checkpoint_metrics"]["val_accuracy"] == best[-1]


def test_batches_to_overfit_are_learned(quick: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_main("train", *quick(num_epochs=4, overfit_batches=1, num_workers=0))
    assert "data       1 batch of " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_loss"] < 0.23
