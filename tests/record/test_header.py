"""Notes in a run's header."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from torch import nn

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split, Splits
from mnist_ray.job.job import read_job
from mnist_ray.many.jobs import say_header
from mnist_ray.many.table import Many
from mnist_ray.record.header import say_plan
from tests.conftest import mnist

EXAMPLES = Arrays(np.zeros((4400, 1), np.float32), np.zeros(4400, np.float32))


def notes_of(console: Mock) -> list[str]:
    return [call.args[1] for call in console.say.call_args_list if call.args[0] == "note"]


@pytest.mark.parametrize(("micro_batch_size", "is_noted"), [(None, False), (16, True), (32, False)])
def test_batch_normalization_in_micro_batches_is_noted(micro_batch_size: int | None, is_noted: bool) -> None:
    session: Any = Mock(is_here=True, cluster=Cluster(is_local=True, nodes=(), log_folder=""))
    workload = mnist()
    workload.create_model = lambda: nn.Sequential(nn.BatchNorm1d(4))  # type: ignore[method-assign]
    session.job = Mock(train=TrainConfig(batch_size=64, micro_batch_size=micro_batch_size), workload=workload)
    say_plan(session, WorkerPlan(2, 1, False, False))
    said = "--micro-batch-size 16: batch normalization normalizes each 16 examples separately"
    assert notes_of(session.console) == [f"{said}, so results differ from those without it"] * is_noted


@pytest.mark.parametrize("folds", [10, 200])
def test_many_folds_are_noted_with_their_examples(folds: int, tmp_path: Any) -> None:
    job = read_job({"folds": folds, "storage_path": str(tmp_path)})
    console = Mock()
    say_header(console, Many(job), Splits("numbers", Split(EXAMPLES), Split(EXAMPLES), Split(EXAMPLES)))
    said = "200 folds train a whole run each, to test it on 22 images"
    assert notes_of(console) == [f"{said}; 5 to 10 folds are usual"] * (folds > 20)
