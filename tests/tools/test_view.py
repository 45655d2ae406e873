import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.digits import Digits
from mnist_ray.config import ViewConfig
from mnist_ray.data.data import Arrays, Data
from mnist_ray.errors import UsageError
from mnist_ray.mnist import idx
from mnist_ray.predictions.predictor import read_image
from mnist_ray.tools import view
from mnist_ray.workload import drawing
from mnist_ray.workload.base import Workload
from tests.conftest import run_job


def test_digit_10_is_printed_and_drawn_as_in_the_file(tmp_path: Path) -> None:
    picture = tmp_path / "ten.png"
    done = run_job("view", "--index", "10", "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "train   60,000 images",
        "test    10,000 images",
        "image   train 10",
        "inputs  (28, 28) uint8, 0 to 254",
        "label   3",
        f"picture {picture}",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(picture))[::12, ::12], idx.load("train").inputs[10])


def test_a_drawn_digit_can_be_read_as_a_picture(mnist_test: Arrays) -> None:
    drawn = Digits().read_picture(read_image(io.BytesIO(drawing.single_image(mnist_test.inputs[0]))))
    assert np.abs(drawn.astype(float) - mnist_test.inputs[0]).mean() < 15


def test_an_index_out_of_range_says_the_range() -> None:
    with pytest.raises(UsageError, match=r"--index 2 is out of range: train examples are 0 to 1$"):
        view.view(Sequences(None, {"number": 2}), ViewConfig(index=2))


class Sequences(Workload):
    """Inputs and targets of several parts; in the second example of each split, of one."""

    def load_data(self) -> Data:
        number = self.metadata["number"]
        tokens, mask = np.arange(3, 131), np.arange(64).reshape(8, 8) < 8
        targets = {
            "boxes": np.full((1, 4), 0.5),
            "none": np.zeros((0, 4)),
            "tags": [True, False],
            "text": "a b " * 99,
            "no": None,
        }
        examples: Any = [(({"tokens": tokens, "scale": 0.25}, mask), targets), (tokens, tokens[:2])]
        return Data(examples[:number], examples[:number])


def test_an_example_without_a_picture_has_a_line_for_its_inputs_and_one_for_its_target(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view.view(Sequences(None, {"number": 2}), ViewConfig(count=9))
    boxes = "boxes: (1, 4) float64, 0.5 to 0.5, none: [], tags: [True, False]"
    assert capsys.readouterr().out.splitlines()[2:] == [
        "example train 0",
        "inputs  tokens: (128,) int64, [3, 4, 5, ..., 128, 129, 130], scale: 0.25; (8, 8) bool, 12% true",
        f"target  {boxes}, text: {'a b ' * 20}…, no: None",
        "example train 1",
        "inputs  (128,) int64, [3, 4, 5, ..., 128, 129, 130]",
        "target  [3, 4]",
        "picture none: Sequences has no as_picture",
    ]
