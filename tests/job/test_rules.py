"""The rules between settings: each has a mistake here, which is one line with a problem and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from mnist_ray import ray_versions
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
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"num_steps": 9, "num_epochs": 2},
        "--num-steps 9 replaces --num-epochs; leave one of them out, or add --num-steps",
    ),
    (
        {"validate_every": 5},
        "--validate-every needs --num-steps: without it, validation follows each pass; leave it out",
    ),
    ({"fold": 2}, "--set fold=2 needs at least as many folds; set --folds"),
    ({"fold": 4, "folds": 3}, "--set fold=4 needs at least as many folds; set --folds"),
    ({"folds": 2, "overfit_batches": 1}, "--overfit-batches tests on the training examples; leave --folds out"),
    (
        {"lr_schedule": "one-cycle", "warmup_steps": 1},
        "--set warmup_steps: one-cycle has its own warm-up; choose another",
    ),
    (
        {"strategy": "fsdp", "compile": True},
        "--strategy fsdp does not work with --compile, which cannot trace how units",
    ),
    ({"strategy": "fsdp", "workload": Experts}, "--strategy fsdp needs all parameters in each step; call every expert"),
    (
        {"workload": Compares, "reproducible": True},
        "--reproducible and --micro-batch-size cut batches into parts, but Compa",
    ),
    (
        {"workload": Compares, "micro_batch_size": 4},
        "--reproducible and --micro-batch-size cut batches into parts, but",
    ),
    ({"reproducible": True, "num_workers": 9}, "--reproducible: 9 workers cannot share the 8 chunks of a batch; lower"),
    ({"reproducible": True, "use_gpu": True}, "--reproducible computes on CPUs only; leave --use-gpu out"),
    (
        {"reproducible": True, "strategy": "fsdp"},
        "--reproducible adds up whole gradients in a fixed order; use --strategy",
    ),
    (
        {"reproducible": True, "micro_batch_size": 4},
        "--reproducible computes one chunk at a time; use --set num_chunks",
    ),
    ({"reproducible": True, "compile": True}, "--reproducible does not work with --compile, whose kernels may give"),
    ({"min_workers": 1}, "--set min_workers needs Ray 2.55 or later, not 2.52.1; leave it out, or upgrade Ray"),
    ({"num_workers": 0, "autoscaling": True}, f"--autoscaling {WITHOUT_RAY}"),
    ({"num_workers": 0, "max_failures": 0}, f"--max-failures {WITHOUT_RAY}"),
    ({"num_workers": 0, "fork_workers": "no"}, f"--set fork_workers {WITHOUT_RAY}"),
    ({"num_workers": 0, "hang_timeout_s": 60}, f"--set hang_timeout_s {WITHOUT_RAY}"),
    ({"num_chunks": 4}, "--set num_chunks has no effect without --reproducible; leave it out"),
    ({"beta1": 0.5, "optimizer": "sgd"}, "--set beta1 has no effect: sgd does not use it; leave it out"),
    ({"beta2": 0.5, "optimizer": "sgd"}, "--set beta2 has no effect: sgd does not use it; leave it out"),
    ({"momentum": 0.5}, "--set momentum has no effect: adam does not use it; leave it out"),
    (
        {"num_seeds": 3, "num_confirmed": 2},
        "--num-confirmed has no effect: each configuration already has several runs",
    ),
    ({"workload": Stream}, "Stream trains on a stream without a length; set --num-steps"),
    ({"workload": Weighted, "limit": 0.1}, "Data(weights=…): the examples to train on all have weight 0"),
    (
        {"lr_schedule": "linear", "warmup_steps": 12},
        "--set warmup_steps=12 must be below the 9 steps of the run; lower",
    ),
    ({"early_stopping_patience": 1, "validation_size": 0}, "--early-stopping-patience needs validation; leave"),
    (
        {"workload": InBlocks, "reproducible": True, "num_streams": 4},
        "--reproducible: data in blocks need num_streams (4)",
    ),
    (
        {"workload": InBlocks, "num_workers": 9},
        "--num-workers 9 is more than the 8 streams of blocks (num_streams); lower",
    ),
    ({"num_streams": 4}, "--set num_streams has no effect: the data are not in blocks; leave it out"),
]


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
    assert refused(given, tmp_path).startswith(message)


def test_each_rule_has_a_mistake() -> None:
    for rule in [rule for rule in (*OF_SETTINGS, *OF_DATA) if rule.kind != "note"]:
        text = max(re.split(r"{.*?}", rule.problem), key=len)[:40]
        assert any(text in message for _, message in MISTAKES), rule.problem


def test_a_rule_names_the_place_that_has_set_what_the_command_line_has_not(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("compile = true\n")
    said = refused({"config": file, "strategy": "fsdp"}, tmp_path)
    assert said.endswith(f"how units are gathered (compile from {file}); leave one of them out")


def test_only_what_this_command_gives_must_have_an_effect(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("momentum = 0.5\nmax_failures = 0\nnum_streams = 4")
    given = {"workload": Plain, "storage_path": tmp_path, "config": tmp_path / "settings.toml", "num_workers": 0}
    assert with_data(read_job(given))[0].train.momentum == 0.5
