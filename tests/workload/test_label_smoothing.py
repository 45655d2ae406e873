from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.workload import Classification, Regression

SMOOTHED = TrainConfig(label_smoothing=0.2)
LOGITS, TARGETS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]]), torch.tensor([0, 2])


class OwnLoss(Classification):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, reduction="none")


def test_a_classification_is_trained_on_smoothed_targets_and_reports_the_plain_loss() -> None:
    workload = Classification()
    expected = F.cross_entropy(LOGITS, TARGETS, reduction="none", label_smoothing=0.2)
    assert torch.equal(workload.training_loss(LOGITS, TARGETS, SMOOTHED), expected)  # type: ignore[arg-type]
    assert torch.equal(workload.loss(LOGITS, TARGETS), F.cross_entropy(LOGITS, TARGETS, reduction="none"))
    assert workload.training_loss(LOGITS, TARGETS, TrainConfig()) is None


@pytest.mark.parametrize("kind", [OwnLoss, Regression])
def test_where_there_are_no_labels_to_smooth_it_is_refused(kind: type[Classification]) -> None:
    with pytest.raises(UsageError, match="--label-smoothing is for a Classification that has no loss of its own"):
        kind().training_loss(LOGITS, TARGETS, SMOOTHED)
    assert kind().training_loss(LOGITS, TARGETS, TrainConfig()) is None
