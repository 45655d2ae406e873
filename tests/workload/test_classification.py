import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.errors import ExampleError, UsageError
from mnist_ray.parallel.group import Group
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import Step
from mnist_ray.workload import Arrays, Classification, Data, Regression, Workload
from mnist_ray.workload.drawing import confusion_matrix, image_grid

SMOOTHED = TrainConfig(label_smoothing=0.2, precision="fp32")
NAMES = ["ant", "bee", "cat", "dog", "elephant"]
LABELS = np.array([0, 0, 0, 1, 1, 3, 3, 3, 3, 4])
PREDICTIONS = np.array([0, 0, 1, 1, 0, 3, 3, 3, 0, 4])
COLUMNS = {"label": LABELS, "prediction": PREDICTIONS}


def workload(names: list[Any] = NAMES) -> Classification:
    return Classification(None, {"class_names": names})


def outputs_and_targets(number: int = 200, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(number, num_classes)).astype(np.float32), rng.integers(num_classes, size=number)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


class Pairs(Dataset):
    """Two examples, with names of the classes, like torchvision's data sets."""

    def __init__(self, classes: list[str] | None = None) -> None:
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index


# --- losses and metrics


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_loss_is_each_examples_cross_entropy(dtype: torch.dtype) -> None:
    outputs, targets = outputs_and_targets()
    logits, labels = torch.from_numpy(outputs), torch.from_numpy(targets)
    expected = -np.log(softmax(outputs)[np.arange(len(targets)), targets])
    np.testing.assert_allclose(workload().loss(logits, labels.to(dtype)), expected, rtol=1e-5)
    assert workload().measure(logits, labels.to(dtype))["accuracy"].tolist() == (outputs.argmax(1) == targets).tolist()
    probabilities = F.one_hot(labels, logits.shape[1]).float()
    torch.testing.assert_close(workload().loss(logits, probabilities), workload().loss(logits, labels))


def test_a_target_that_is_no_label_is_rejected() -> None:
    outputs, targets = map(torch.from_numpy, outputs_and_targets())
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        workload().loss(outputs, torch.full_like(targets, -100))
    with pytest.raises(ExampleError, match=r"targets of type torch\.float32; class labels must be whole numbers"):
        workload().loss(outputs, targets + 0.5)


class OwnLoss(Classification):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, reduction="none")


@pytest.mark.parametrize("kind", [OwnLoss, Regression])
def test_smoothing_is_refused_without_labels(kind: type[Workload]) -> None:
    model = nn.Linear(1, 1)
    step = Step(kind(), TrainingState(model, {}, {}), SMOOTHED, Group())
    batch = MicroBatch(torch.ones(2, 1), torch.ones(2), 2, 2)
    message = "label_smoothing is for a Classification that has no loss of its own"
    with pytest.raises(UsageError, match=message), step.on([batch]):
        step.backward(kind().batch_loss)


def test_predictions_are_label_prediction_and_probabilities() -> None:
    outputs, targets = outputs_and_targets()
    columns = workload().predictions(torch.from_numpy(outputs), torch.from_numpy(targets))
    assert list(columns) == ["label", "prediction", "probability", "probabilities"]
    np.testing.assert_allclose(columns["probabilities"], softmax(outputs), rtol=1e-5)
    np.testing.assert_array_equal(columns["label"], targets)
    np.testing.assert_array_equal(columns["prediction"], outputs.argmax(1))
    np.testing.assert_allclose(columns["probability"], softmax(outputs).max(1), rtol=1e-5)


def test_the_top_predictions_are_the_most_probable_classes_by_name() -> None:
    outputs, _ = outputs_and_targets(4)
    probabilities = softmax(outputs)
    for top, expected in zip(workload().top_predictions(torch.from_numpy(outputs)), probabilities, strict=True):
        best = np.argsort(-expected)[:3]
        assert [name for name, _ in top] == [NAMES[index] for index in best]
        assert [probability for _, probability in top] == pytest.approx(expected[best], rel=1e-5)
    (top,) = workload(["no", "yes"]).top_predictions(torch.tensor([[0.0, 1.0]]))
    assert [name for name, _ in top] == ["yes", "no"]


# --- names of the classes


def test_names_of_classes_come_from_the_metadata_else_from_the_data_set() -> None:
    dataset = Pairs(["no", "yes"])
    names = workload().metadata_of(Data(dataset, dataset))
    assert names == {"class_names": ["no", "yes"]}
    names["class_names"].append("maybe")
    assert dataset.classes == ["no", "yes"]
    data = Data(dataset, dataset, metadata={"class_names": ["false", "true"], "mean": 0.5})
    assert workload().metadata_of(data) == {"class_names": ["false", "true"], "mean": 0.5}


def test_without_names_the_largest_target_of_all_splits_decides() -> None:
    train, validation, test = (
        Arrays(np.zeros((3, 2)), np.array(targets)) for targets in ([0, 1, 1], [4, 0, 0], [2] * 3)
    )
    assert workload().metadata_of(Data(train, test, validation)) == {"class_names": [0, 1, 2, 3, 4]}
    assert workload().metadata_of(Data(train, test, metadata={"mean": 1})) == {"mean": 1, "class_names": [0, 1, 2]}


def test_a_dataset_without_classes_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError) as raised:
        workload().metadata_of(Data(Pairs(), Pairs()))
    assert str(raised.value) == (
        'the data name no classes: return Data(..., metadata={"class_names": [...]}) from load_data'
    )


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_targets_are_compared_with_the_classes_in_each_split(part: str) -> None:
    right, wrong = (Arrays(np.zeros((2, 2)), np.array(targets, np.uint8)) for targets in ([0, 3], [0, 4]))
    data = Data(**{"train": right, "test": right, part: wrong})  # type: ignore[arg-type]
    workload().check_data(data)
    with pytest.raises(UsageError) as raised:
        workload(NAMES[:4]).check_data(data)
    assert str(raised.value) == f"Classification.load_data: {part} has target 4 in row 1, but the classes are 0 to 3"


# --- results


def test_very_many_classes_have_no_confusion_matrix_but_their_accuracies() -> None:
    assert workload([*range(13)]).lines({"label": np.array([4, 0]), "prediction": np.array([1, 0])}) == []
    many = workload([*range(100_000)])
    details = many.details({"label": np.array([7, 7]), "prediction": np.array([7, 99_999])})
    assert (details["accuracy_per_class"][7], len(details["accuracy_per_class"])) == (0.5, 100_000)
    assert many.pictures(details, None, {}) == []


def test_details_are_json() -> None:
    details = workload().details(COLUMNS)
    assert details["accuracy_per_class"] == [2 / 3, 1 / 2, None, 3 / 4, 1]
    assert details["confusion_matrix"] == [[2, 1, *[0] * 3], [1, 1, *[0] * 3], [0] * 5, [1, 0, 0, 3, 0], [*[0] * 4, 1]]
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_five_classes_show_five_rows() -> None:
    lines = workload().lines(COLUMNS)
    assert [label for label, _ in lines] == ["confusion", "", "", "", "", ""]
    assert [line for _, line in lines] == [
        "   label      ant      bee      cat      dog elephant  accuracy",
        "     ant        2        1        ·        ·        ·    66.67%",
        "     bee        1        1        ·        ·        ·    50.00%",
        "     cat        ·        ·        ·        ·        ·         -",
        "     dog        1        ·        ·        3        ·    75.00%",
        "elephant        ·        ·        ·        ·        1   100.00%",
    ]


def test_the_report_has_pictures_without_examples_to_show() -> None:
    pictures = workload().pictures(workload().details(COLUMNS), None, {})
    assert [picture.name for picture in pictures] == ["confusion"]
    assert pictures[0].alt == "Confusion matrix: 3 mistakes among 10; most often ant was taken for bee (1)"


@pytest.mark.parametrize(
    ("classes", "named"), [(["a", "c"], "b"), (["a", "b", "c", "d"], "d"), (["b", "a", "c"], "their order")]
)
def test_a_split_with_other_classes_is_refused(classes: list[str], named: str) -> None:
    data, problem = Data(Pairs(["a", "b", "c"]), Pairs(classes)), workload(["a", "b", "c"])
    expected = f"Classification.load_data: test and the model differ in classes: {named}$"
    with pytest.raises(UsageError, match=expected):
        problem.check_data(data)


def test_names_with_dollars_are_no_formulas_and_long_captions_are_drawn(few_images: Arrays) -> None:
    assert confusion_matrix(np.eye(2, dtype=int), ["$\\wrong$", "$0-$50"]).startswith(b"\x89PNG")
    assert image_grid([few_images.inputs[0]], ["x" * 1000]).startswith(b"\x89PNG")
