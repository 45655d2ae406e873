"""Notes in a run's header."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mnist_ray.data.data import Arrays, Split, Splits
from mnist_ray.job.job import read_job
from mnist_ray.many.jobs import say_header
from mnist_ray.many.table import Many

EXAMPLES = Arrays(np.zeros((4400, 1), np.float32), np.zeros(4400, np.float32))


def notes_of(console: Mock) -> list[str]:
    return [call.args[1] for call in console.say.call_args_list if call.args[0] == "note"]


@pytest.mark.parametrize("folds", [10, 200])
def test_many_folds_are_noted_with_their_examples(folds: int, tmp_path: Any) -> None:
    job = read_job({"folds": folds, "storage_path": str(tmp_path)})
    console = Mock()
    say_header(console, Many(job), Splits("numbers", Split(EXAMPLES), Split(EXAMPLES), Split(EXAMPLES)))
    said = "200 folds train a whole run each, to test it on 22 images"
    assert notes_of(console) == [f"{said}; 5 to 10 folds are usual"] * (folds > 20)
