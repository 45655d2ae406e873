"""Notes in a run's header."""

from typing import Any
from unittest.mock import Mock

import pytest
from torch import nn

from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.config import TrainConfig
from mnist_ray.record.header import say_plan
from tests.conftest import mnist


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
