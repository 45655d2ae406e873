"""The rules between settings: each has a mistake here, which is one line with a problem and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from mnist_ray import ray_versions
from mnist_ray.config import shown
from mnist_ray.errors import UsageError
from mnist_ray.job.job import read_job
from mnist_ray.job.rules import OF_DATA, OF_SETTINGS
from mnist_ray.many.jobs import read_sweep
from mnist_ray.workload import Arrays, Data, Regression
from tests.conftest import Numbers, with_data
from tests.data.test_streams import Streaming


class Plain(Regression):
    """A hundred numbers."""

    def load_data(self) -> Data:
        some = Arrays(np.zeros((100, 1), np.float32), np.zeros(100))
        return Data(some, some)

    def create_model(self) -> nn.Module:
        return nn.Linear(1, 1)


class Experts(Plain):
    has_unused_parameters = True


class Compares(Plain):
    compares_examples = True


class Weighted(Plain):
    def load_data(self) -> Data:
        return Data(super().load_data().train, super().load_data().test, weights=np.arange(100) == 99)


class InBlocks(Plain):
    def load_data(self) -> Data:
        return Data(Numbers(), Numbers())


class Stream(Streaming):
    def load_data(self) -> Data:
        data = super().load_data()
        return Data(data.train, data.test)


WITHOUT_RAY = "has no effect with --num-workers 0, which trains without Ray; leave it out"
ONE_OF_BOTH = "leave one of them out"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": 9, "num_epochs": 2},
     f"--num-steps 9 replaces --num-epochs; {ONE_OF_BOTH}, or add --num-steps none"),
    ({"fold": 2}, "--set fold=2 needs at least as many folds; set --folds"),
    ({"fold": 4, "folds": 3}, "--set fold=4 needs at least as many folds; set --folds"),
    ({"folds": 2, "overfit_batches": 1}, "--overfit-batches tests on the training examples; leave --folds out"),
    ({"lr_schedule": "one-cycle", "warmup_steps": 1},
     "--set warmup_steps: one-cycle has a warm-up of its own, or none; choose another --lr-schedule"),
    ({"strategy": "fsdp", "compile": True},
     f"--strategy fsdp does not work with --compile, which cannot trace how units are gathered; {ONE_OF_BOTH}"),
    ({"strategy": "fsdp", "workload": Experts},
     "--strategy fsdp needs all parameters in each step; call every expert, also on no rows, and leave "
     "has_unused_parameters out"),
    *(({"workload": Compares, **each},
       "--reproducible and --micro-batch-size cut batches into parts, but Compares's loss compares their examples; "
       "leave both out")
      for each in ({"reproducible": True}, {"micro_batch_size": 4})),
    ({"reproducible": True, "num_workers": 9},
     "--reproducible: 9 workers cannot share the 8 chunks of a batch; lower --num-workers, or start a run with more "
     "num_chunks"),
    ({"reproducible": True, "use_gpu": True}, "--reproducible computes on CPUs only; leave --use-gpu out"),
    ({"reproducible": True, "strategy": "fsdp"},
     "--reproducible adds up whole gradients in a fixed order; use --strategy ddp"),
    ({"reproducible": True, "micro_batch_size": 4},
     "--reproducible computes one chunk at a time; use --set num_chunks, not --micro-batch-size"),
    ({"reproducible": True, "compile": True},
     f"--reproducible does not work with --compile, whose kernels may give different bits; {ONE_OF_BOTH}"),
    ({"min_workers": 1}, "--set min_workers needs Ray 2.55 or later, not 2.52.1; leave it out, or upgrade Ray"),
    *(({"num_workers": 0, name: value}, f"{shown(name)} {WITHOUT_RAY}")
      for name, value in {"autoscaling": True, "max_failures": 0, "fork_workers": "no", "hang_timeout_s": 60}.items()),
    ({"no_test": True, "folds": 2},
     "--no-test has no effect with --folds: each run is tested on its part; leave it out"),
    ({"num_chunks": 4}, "--set num_chunks has no effect without --reproducible; leave it out"),
    *(({name: 0.5, "optimizer": optimizer}, f"--set {name} has no effect: {optimizer} does not use it; leave it out")
      for name, optimizer in (("beta1", "sgd"), ("beta2", "sgd"), ("momentum", "adam"), ("momentum", "adamw"))),
    ({"num_seeds": 3, "num_confirmed": 2},
     "--num-confirmed has no effect: each configuration already has several runs, of --num-seeds or --folds; leave it "
     "out"),
    ({"workload": Stream}, "Stream trains on a stream without a length; set --num-steps"),
    ({"no_test": True, "validation_size": 0},
     "there is neither a test nor a validation set, so nothing evaluates the trained model; give Data.test or "
     "Data.validation, or leave --no-test and --validation-size 0 out"),
    ({"workload": Weighted, "limit": 0.1},
     "Data(weights=…): the examples to train on all have weight 0; use more of the data, or other weights"),
    ({"lr_schedule": "linear", "warmup_steps": 12},
     "--set warmup_steps=12 must be below the 9 steps of the run; lower it"),
    ({"early_stopping_patience": 1, "validation_size": 0},
     "--early-stopping-patience needs validation; leave --validation-size 0 and --overfit-batches out"),
    ({"workload": InBlocks, "reproducible": True, "num_streams": 4},
     "--reproducible: data in blocks need num_streams (4) and num_chunks (8) to be equal; set both"),
    ({"workload": InBlocks, "num_workers": 9},
     "--num-workers 9 is more than the 8 streams of blocks (num_streams); lower it, or start a run with more "
     "num_streams"),
    ({"num_streams": 4}, "--set num_streams has no effect: the data are not in blocks; leave it out"),
    ({"validation_size": 100}, "--validation-size 100 leaves nothing to train on: the data has 100 training examples"),
    ({"validation_size": 90, "batch_size": 41}, "--batch-size 41 is larger than the 10 examples to train on"),
]  # fmt: skip
NOTES: list[tuple[dict[str, Any], str]] = [
    ({"workload": InBlocks, "num_streams": 16},
     "12 blocks for 16 streams of blocks (num_streams): some are read twice; write smaller ones"),
    ({"validation_size": 80}, "batch size 20, not 32: there are only 20 examples to train on"),
    *(({"early_stopping_patience": 1, "batch_size": 9, "lr_schedule": schedule},
       f"the {schedule} schedule spans all epochs: if training stops early, the learning rate has not come down; "
       "--lr-schedule constant avoids that")
      for schedule in ("one-cycle", "cosine", "linear")),
]  # fmt: skip


def refused(given: dict[str, Any], tmp_path: Path) -> str:
    read = read_sweep if "num_confirmed" in given else lambda given: with_data(read_job(given))
    with pytest.raises(UsageError) as raised:
        read({"workload": Plain, "storage_path": tmp_path, **given})
    return str(raised.value)


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=str)
def test_a_broken_rule_is_one_line(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "min_workers" in given:
        monkeypatch.setattr(ray_versions, "ray_version", lambda: "2.52.1")
        monkeypatch.setattr("mnist_ray.job.rules.ray_version", lambda: "2.52.1")
    assert refused(given, tmp_path) == message


@pytest.mark.parametrize(("given", "note"), NOTES, ids=str)
def test_what_may_be_unwanted_is_noted(given: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert with_data(read_job({"workload": Plain, "storage_path": tmp_path, **given}))[0].notes == (note,)


def test_each_rule_has_a_mistake_or_a_note() -> None:
    for rule in (*OF_SETTINGS, *OF_DATA):
        text = max(re.split(r"{.*?}", rule.problem), key=len)
        assert any(text in message for _, message in (*MISTAKES, *NOTES)), rule.problem


def test_a_rule_names_the_place_that_has_set_what_the_command_line_has_not(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("compile = true\n")
    said = refused({"config": file, "strategy": "fsdp"}, tmp_path)
    assert said.endswith(f"how units are gathered (compile from {file}); leave one of them out")


def test_only_what_this_command_gives_must_have_an_effect(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("momentum = 0.5\nmax_failures = 0\nnum_streams = 4")
    given = {"workload": Plain, "storage_path": tmp_path, "config": tmp_path / "settings.toml", "num_workers": 0}
    job, _ = with_data(read_job({**given, "lr_schedule": "constant", "batch_size": 9}))
    assert (job.train.momentum, job.notes) == (0.5, ())
