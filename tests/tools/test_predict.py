import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mnist_ray.checkpoints.find import find
from mnist_ray.checkpoints.state_file import digest_of
from mnist_ray.config import PredictionConfig
from mnist_ray.data import images
from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError, UsageError
from mnist_ray.predictions.predictor import Prediction, Predictor
from mnist_ray.tools import predict
from mnist_ray.workload import Classification, Regression
from tests.conftest import ROOT, mnist, run_job, run_main


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, mnist_test: Arrays) -> Path:
    """A folder with eight digits, dark on light, one of them in a subfolder, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for index in range(5000, 5008):
        place = folder / "more" if index == 5007 else folder
        Image.fromarray(255 - mnist_test.inputs[index]).resize((140, 140)).save(place / f"{index}.png")
    (folder / "notes.txt").write_text("no picture, and not named as one")
    return folder


def test_each_file_gets_a_prediction_or_a_reason_and_the_last_line_counts_the_failed(
    finished_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("L", (40, 40), 255).save(tmp_path / "blank.bmp")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.effect_noise((90, 90), 99).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 900)
    given = (tmp_path, pictures, "~nosuchuser/x.png", tmp_path / ("a" * 300), tmp_path / "folder")
    flags = (*map(str, given), "--run", str(finished_run))
    flags = (*flags, "--workload", str(ROOT / "examples" / "digits.py"))
    with pytest.raises(JobError, match=r"^no prediction for 8 of 16 files$"):
        run_main("predict", *flags)
    checkpoint, *lines = capsys.readouterr().out.splitlines()
    assert checkpoint.startswith("checkpoint ")
    assert lines[0] == f"{tmp_path}/blank.bmp: shows no digit: nothing stands out from its background"
    assert lines[1].startswith(f"{tmp_path}/cut.png: cannot be read: ")
    assert lines[2] == f"{tmp_path}/empty.png: not an image in a known format"
    assert lines[3].startswith(f"{tmp_path}/huge.png: cannot be read: Image size (400000000 pixels) exceeds limit")
    assert lines[4] == f"{tmp_path}/text.jpg: not an image in a known format"
    assert [Path(line.split(": ")[0]).stem for line in lines[5:13]] == [str(index) for index in range(5000, 5008)]
    assert lines[13] == "~nosuchuser/x.png: cannot be read: No such file or directory"
    assert lines[14].endswith("aaa: cannot be read: File name too long")
    assert lines[15].endswith("folder: not a file")
    assert len(lines) == 16


def test_json_prints_all_predictions(finished_run: Path, pictures: Path, mnist_test: Arrays) -> None:
    done = run_job("predict", str(pictures), "--run", str(finished_run), "--json", "--threshold", "1")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["predictions"]
    assert len(answers) == 8
    right = sum(answer["prediction"] == mnist_test.targets[int(Path(answer["file"]).stem)] for answer in answers)
    assert right >= 5
    for answer in answers:
        probabilities = [answer["probability"], *(other["probability"] for other in answer["next"])]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len({answer["prediction"], *(other["prediction"] for other in answer["next"])}) == 3
        assert answer["unsure"]


def test_predictions_below_the_threshold_are_unsure() -> None:
    answer = Prediction("a.png", np.zeros((28, 28), np.uint8), ((3, 0.7), (8, 0.2), (5, 0.05)))
    assert answer.to_line(0.7) == "a.png: 3  70.0% (then 8 20.0%, 5 5.0%)"
    assert answer.to_line(0.71).endswith("  unsure")


def test_flags_may_stand_between_pictures_and_the_newest_run_is_the_default(
    finished_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = sorted(pictures.glob("*.png"))
    run_main("predict", str(first), "--storage-path", str(finished_run.parent), "--threshold", "0", str(second))
    checkpoint, *lines = capsys.readouterr().out.splitlines()
    assert checkpoint.startswith(f"checkpoint {finished_run}/checkpoint_")
    assert checkpoint.endswith("(MNIST)")
    assert [line.split(": ")[0] for line in lines] == [str(first), str(second)]


@pytest.mark.parametrize("given", ["sent", None])
def test_code_that_came_with_a_run_is_not_loaded(finished_run: Path, tmp_path: Path, given: str | None) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(finished_run, sent)
    code = sent / "steals.py"
    code.write_text("from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n")
    for file in (sent / "config.json", *sent.glob("checkpoint_*/state.json")):
        values = json.loads(file.read_text())
        values["workload"] = str(code) if file.parent == sent else {**values["workload"], "reference": str(code)}
        if "sha256" in values:
            values["sha256"]["state.json"] = digest_of(values)
        file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="the code may have come with the run; if you trust it"):
        find(given, str(tmp_path))
    assert not (sent / "it_ran").exists()


def test_a_checkpoint_finds_its_class_and_says_that_the_file_has_changed(
    finished_run: Path, write: Any, tmp_path: Path
) -> None:
    sent = tmp_path / "runs" / "sent"
    shutil.copytree(finished_run, sent)
    code = write("from mnist_ray.mnist import MNIST\nclass Mine(MNIST): pass\n", "elsewhere/changing.py")
    for file in sent.glob("checkpoint_*/state.json"):
        values = json.loads(file.read_text())
        values["workload"] |= {"reference": f"{code}:Mine"}
        values["sha256"]["state.json"] = digest_of(values)
        file.write_text(json.dumps(values))
    code.write_text(code.read_text() + "class Other(MNIST): pass\n")
    found = find(str(sent), "~/ray_results")
    assert type(found.workload).__name__ == "Mine"
    assert found.notes == (f"the workload has changed since the checkpoint was made: {code}:Mine",)


def test_a_workload_that_does_not_read_pictures_is_refused_once() -> None:
    regression = Regression(None, {"any": 1})
    with pytest.raises(UsageError, match=r"^Regression does not take images: .*; choose another run with --run$"):
        next(predict.predict_files(Predictor(regression, mnist().create_model()), [Path("a.png"), Path("b.png")]))


def answers_to(*given: Path | str) -> list[str]:
    """Return an untrained model's best prediction for each file, or the reason why there is none."""
    files = list(predict.find_files(map(str, given)))
    answers = predict.predict_files(Predictor(mnist(), mnist().create_model().eval()), files)
    return [(answer.error or "").rpartition(".png: ")[2] or str(answer.top[0][0]) for answer in answers]


def test_only_known_formats_are_read(few_images: Arrays, tmp_path: Path) -> None:
    image = Image.fromarray(few_images.inputs[0])
    for number, name in enumerate((*images.FORMATS, "EPS", "PCX")):
        image.save(tmp_path / f"{number}.png", name)
    *read, postscript, other = answers_to(tmp_path)
    assert all(answer.isdigit() for answer in read)
    assert (postscript, other) == ("not an image in a known format",) * 2


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    assert answers_to(tmp_path / "fifo.png") == ["not a file"]


def test_a_regression_predicts_values_without_probabilities() -> None:
    regression, points = Regression(None, {"any": 1}), np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    first, second = Predictor(regression, model).predict(points)
    assert (first.top[0][0], second.top[0][0]) == (3.0, 7.0)
    assert first.is_sure(0.8)
    assert replace(first, file="a.png").to_line(0.8) == "a.png: 3"
    assert first.to_dict(0.8) == {"file": "", "prediction": 3.0, "unsure": False, "next": []}


def test_harmless_damage_is_no_warning(few_images: Arrays, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # says that five entries follow
    Image.fromarray(few_images.inputs[0]).save(tmp_path / "a.jpg", exif=exif)
    assert answers_to(tmp_path)[0].isdigit()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_damaged_picture_may_raise_anything_but_damaged_exif_data_do_not_matter(
    few_images: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(few_images.inputs[0]).save(tmp_path / "a.png")
    failing = Mock(side_effect=struct.error("unpack requires 4 bytes"))
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", failing)
    assert answers_to(tmp_path)[0].isdigit()
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
    assert answers_to(tmp_path) == ["cannot be read: unpack requires 4 bytes"]


def test_pictures_and_inputs_are_computed_a_few_at_a_time(few_images: Arrays) -> None:
    model = Mock(nn.Identity(), side_effect=lambda inputs: torch.eye(10)[[len(inputs) % 10] * len(inputs)])
    model.parameters.return_value = iter(())
    predictions = Predictor(mnist(), model).predict(few_images.inputs[:70])
    assert [len(call.args[0]) for call in model.call_args_list] == [64, 16]
    assert [prediction.top[0][0] for prediction in predictions] == [4] * 64 + [6] * 6


def test_names_are_printed_in_one_line_and_predictions_carry_the_inputs(
    few_images: Arrays, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(few_images.inputs[0]).save(tmp_path / "a\x1b[31m\nb.png")
    predict.predict(find(str(finished_run), "~/ray_results"), PredictionConfig(files=(str(tmp_path),)))
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(rf"{tmp_path}/a\x1b[31m\nb.png: ")
    (answer,) = predict.predict_files(Predictor(mnist(), mnist().create_model().eval()), tmp_path.iterdir())
    np.testing.assert_array_equal(answer.inputs, few_images.inputs[0])


def test_a_read_picture_that_fails_is_the_reason_for_its_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(workload: Any, picture: Image.Image) -> np.ndarray:
        return np.zeros((28, 28), np.uint8) if picture.width == 1 else 1 / 0  # type: ignore[return-value]

    monkeypatch.setattr(type(mnist()), "read_picture", read)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, width in zip(files, (1, 2, 1), strict=True):
        Image.new("L", (width, 1)).save(file)
    found = list(predict.predict_files(Predictor(mnist(), mnist().create_model()), files))
    assert [prediction.error is None for prediction in found] == [True, False, True]
    assert (found[1].error or "").startswith(f"{files[1]}: MNIST, read_picture: ZeroDivisionError: division by zero")


def test_inputs_of_different_lengths_are_predicted_with_the_workloads_collate() -> None:
    class Longest(Classification):
        def collate(self, examples: Any) -> Any:
            words, targets = zip(*examples, strict=True)
            return pad_sequence([torch.tensor(word) for word in words], batch_first=True), torch.tensor(targets)

    words = [np.ones(length, np.float32) for length in (2, 1)]
    workload, model = Longest(metadata={"class_names": ["short", "long"]}), nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0, 0], [0, 2.0]]))
        model.bias.copy_(torch.tensor([1.0, 0]))
    found = Predictor(workload, model).predict(words)
    assert [prediction.top[0][0] for prediction in found] == ["long", "short"]
    assert Predictor(mnist(), mnist().create_model()).predict(np.empty((0, 28, 28), np.uint8)) == []


def test_inputs_may_be_dicts() -> None:
    class Keyed(Classification):
        def prepare(self, inputs: Any, generator: Any) -> Any:
            return inputs["point"]

    workload, point = Keyed(metadata={"class_names": "ab"}), np.ones(2, np.float32)
    (prediction,) = Predictor(workload, nn.Linear(2, 2)).predict([{"point": point}])
    assert prediction.top[0][1] > 0.5
