from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import mnist_ray
from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError, UsageError
from mnist_ray.predictions.predictor import Predictor
from mnist_ray.workload import Regression, Workload
from tests.conftest import mnist


def test_a_row_has_the_same_bits_whatever_is_computed_with_it(finished_run: Path, mnist_test: Arrays) -> None:
    predictor = mnist_ray.load_predictor(finished_run, device="cpu")
    every = predictor.predict(mnist_test.inputs[:130])
    for size in (1, 2, 5, 17, 63):
        assert [one.top for one in predictor.predict(mnist_test.inputs[:size])] == [one.top for one in every[:size]]
        assert [one.top for one in predictor.predict(mnist_test.inputs[7 : 7 + size])] == [
            one.top for one in every[7 : 7 + size]
        ]


def test_columns_hold_the_bits_of_predictions(finished_run: Path, mnist_test: Arrays) -> None:
    predictor = mnist_ray.load_predictor(finished_run, device="cpu")
    columns, predictions = predictor.columns(mnist_test.inputs[:70]), predictor.predict(mnist_test.inputs[:70])
    tops = [prediction.top for prediction in predictions]
    assert columns["prediction"].tolist() == [top[0][0] for top in tops]
    assert columns["probability"].tolist() == [top[0][1] for top in tops]
    for row, top in zip(columns["probabilities"].tolist(), tops, strict=True):
        assert sorted(row, reverse=True)[:3] == [probability for _, probability in top]
        assert row[top[0][0]] == top[0][1]
    assert {name: values.shape for name, values in predictor.columns([]).items()} == {
        "prediction": (0,),
        "probability": (0,),
        "probabilities": (0, 10),
    }


def test_a_regressions_column_has_no_probability() -> None:
    columns = Predictor(Regression(None, {"any": 1}), nn.Linear(2, 1)).columns(np.ones((3, 2), np.float32))
    assert columns.keys() == {"prediction"}
    assert columns["prediction"].dtype == np.float64


def test_a_picture_is_decoded_from_bytes_a_path_or_an_image(few_images: Arrays, tmp_path: Path) -> None:
    file, predictor = tmp_path / "a.png", Predictor(mnist(), mnist().create_model())
    Image.fromarray(few_images.inputs[0]).save(file)
    for content in (file, file.read_bytes(), Image.open(file)):
        np.testing.assert_array_equal(predictor.decode(content), few_images.inputs[0])
    assert predictor.takes == "pictures"
    with pytest.raises(JobError, match=r"^not an image in a known format$"):
        predictor.decode(b"")
    with pytest.raises(JobError, match=r"^cannot be read: "):
        predictor.decode(file.read_bytes()[:90])


def test_a_text_is_continued() -> None:
    class Echo(Workload):
        def complete(self, model: Any, prompt: str) -> str:
            return prompt * 2

    predictor = Predictor(Echo(), nn.Identity())
    assert predictor.takes == "texts"
    assert predictor.predict(["ab"])[0].best == "abab"
    assert predictor.columns(["ab", "c"])["prediction"].tolist() == ["abab", "cc"]


def test_a_device_that_does_not_exist_is_one_line(finished_run: Path) -> None:
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(UsageError, match=f"^device {device} cannot be used: "):
            mnist_ray.load_predictor(finished_run, device=device)
