import contextlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.tensors import buffers_kept
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group
from mnist_ray.training.evaluation import evaluate, evaluate_together
from tests.conftest import mnist


def test_evaluation_agrees_with_a_plain_computation(few_images: Arrays) -> None:
    model = mnist().create_model()
    evaluation = evaluate(mnist(), model, Split(few_images), TrainConfig())
    logits = model(mnist().prepare(torch.tensor(few_images.inputs), None))
    labels = torch.tensor(few_images.targets).long()
    assert evaluation.values(mnist())["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (few_images.targets, logits.argmax(1).numpy()), 1)
    assert mnist().details(evaluation.columns)["confusion_matrix"] == expected.tolist()


def test_a_workload_chooses_the_batches_of_its_evaluations(few_images: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, measure = mnist(), Mock(return_value={})
    monkeypatch.setattr(workload, "evaluation_batch_size", lambda on_gpu: 250)
    monkeypatch.setattr(workload, "measure", measure)
    evaluate(workload, workload.create_model(), Split(few_images), TrainConfig())
    assert [len(call.args[1]) for call in measure.call_args_list] == [250, 250, 100]


@pytest.mark.parametrize(("micro_batch_size", "size"), [(None, 100), (128, 100), (60, 50), (13, 10)])
def test_an_evaluation_computes_no_more_at_a_time_than_a_micro_batch(
    micro_batch_size: int | None, size: int, few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, measure = mnist(), Mock(return_value={})
    monkeypatch.setattr(workload, "measure", measure)
    images, model = Split(few_images).take(slice(0, 120)), workload.create_model()
    evaluate_together(workload, model, images, TrainConfig(micro_batch_size=micro_batch_size), Group())
    assert [len(call.args[1]) for call in measure.call_args_list] == [size] * (120 // size) + [20] * (size > 20)


def test_an_evaluation_leaves_layers_in_their_mode_and_no_tensors_that_cannot_be_trained_with(
    few_images: Arrays,
) -> None:
    model = mnist().create_model()
    model.get_submodule("conv1").eval()
    kept: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, outputs: kept.append(outputs))
    switched: list[bool] = []  # a LoRA layer merges its weights here

    def train(mode: bool = True) -> nn.Module:
        switched.append(mode)
        return nn.Module.train(model, mode)

    vars(model)["train"] = train
    evaluate(mnist(), model, Split(few_images), TrainConfig())
    assert [name for name, module in model.named_modules() if not module.training] == ["conv1"]
    assert switched == [False, True]
    assert not kept[0].is_inference()


def test_a_model_that_fails_in_an_evaluation_is_left_as_it_was(few_images: Arrays) -> None:
    class Failing(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise ValueError

    model = Failing(784, 10)
    with pytest.raises(ValueError, match=r"^$"):
        evaluate(mnist(), model, Split(few_images), TrainConfig())
    assert model.training


def test_a_block_that_fails_leaves_buffers_and_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reshard = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), Mock()
    monkeypatch.setattr(model, "reshard", reshard, raising=False)
    monkeypatch.setattr(sharding, "is_sharded", lambda tensor: True)
    with contextlib.suppress(ValueError), sharding.resharded(model), buffers_kept(model):
        model(torch.ones(3, 2))
        raise ValueError
    assert reshard.called
    assert model.get_buffer("0.num_batches_tracked") == 0
