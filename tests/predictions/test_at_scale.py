"""Data at scale, mostly part by part in this process; two tests use Ray."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet as pq
from torch import Generator, Tensor, nn

import mnist_ray
from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError, UsageError
from mnist_ray.predictions import at_scale, inputs
from mnist_ray.predictions.inputs import find_inputs
from mnist_ray.predictions.predictor import Predictor
from mnist_ray.storage import locate
from mnist_ray.workload import Regression, Workload
from tests.conftest import ROOT, mnist, run_main


@pytest.fixture
def scans(tmp_path: Path, mnist_test: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 23 digits and a damaged picture, in parts of 10 files."""
    monkeypatch.setattr(inputs, "_GROUP", 10)
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    for index in range(23):
        Image.fromarray(mnist_test.inputs[index]).save((folder / "more" if index > 20 else folder) / f"{index:02}.png")
    (folder / "20.png").rename(folder / "20.Png")
    (folder / "damaged.png").write_bytes((folder / "00.png").read_bytes()[:60])
    return folder


class Sums(Regression):
    """Predicts the sum of an input's numbers."""

    source = type(mnist()).source

    def create_model(self) -> nn.Module:
        model = nn.Linear(2, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        return model


class Weighted(Sums):
    """The second number counts ten times."""

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        return inputs.float() * torch.tensor([1.0, 10.0])


class Echo(Workload):
    """Repeats a text."""

    def create_model(self) -> nn.Module:
        return nn.Identity()

    def complete(self, model: nn.Module, prompt: str) -> str:
        return prompt * 2


def predicted(workload: Workload, place: Path, output: Path, columns: tuple[str, ...] = ()) -> None:
    """Predict all parts in this process, as an actor does."""
    found, folder = find_inputs(str(place), workload, columns), locate(str(output), "")
    actor = at_scale.PartPredictor(None, found, folder, 1)  # type: ignore[arg-type]
    actor.__dict__["_predictor"] = Predictor(workload, workload.create_model().eval())
    for part in found.parts.items():
        actor.predict(*part)


def unreadable(output: Path) -> dict[str, str]:
    """Return the reasons by input."""
    files = sorted((output / "_unreadable").rglob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["input"]: line["reason"] for line in lines}


def scale(finished_run: Path, scans: Path, output: Path, *flags: str) -> None:
    run_main("predict", "--run", str(finished_run), "--input", str(scans), "--output", str(output), *flags)


def test_a_folder_is_predicted_on_ray_with_the_bits_of_single_files_and_goes_on_where_it_was(
    ray_address: str, finished_run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits"
    scale(finished_run, scans, output, "--num-actors", "1")
    said = capsys.readouterr().out
    rows = pd.read_parquet(output).sort_values("file")
    predictor = mnist_ray.load_predictor(finished_run, device="cpu")
    for file, prediction, probability in zip(rows.file, rows.prediction, rows.probability, strict=True):
        (single,) = mnist_ray.predict(scans / file, finished_run)
        assert (prediction, float(probability)) == single.top[0]
        assert predictor.predict([predictor.decode(scans / file)])[0].top == single.top
    assert [*rows.file] == [*(f"{n:02}.png" for n in range(20)), "20.Png", "more/21.png", "more/22.png"]
    assert unreadable(output).keys() == {"damaged.png"}
    assert "pictures in 3 parts\n" in said
    assert re.search(rf"^predicted +23 images, 1 unreadable \(reasons: {output}/_unreadable\)$", said, re.MULTILINE)

    before = {file: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    (output / "_done" / "part-00001.parquet.json").unlink()  # as if it had been killed
    (output / "_temporary").mkdir()
    (output / "_temporary" / "half").touch()
    with (output / "part-00002.parquet").open("r+b") as cut_off:
        cut_off.truncate(900)
    scale(finished_run, scans, output)
    assert "pictures in 3 parts, 1 already predicted\n" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    assert sorted(file.name for file in before if before[file] != after[file]) == [
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    pd.testing.assert_frame_equal(pd.read_parquet(output).sort_values("file"), rows)
    assert not (output / "_temporary").exists()

    scale(finished_run, scans, output, "--json")  # everything is done
    assert json.loads(capsys.readouterr().out) == {"rows": 23, "unreadable": 1}
    with pytest.raises(UsageError, match="holds predictions with another input; choose another folder"):
        scale(finished_run, scans, output, "--input", str(scans / "*.png"))
    (output / "_done" / "part-00001.parquet.json").write_text('{"rows": 8}')
    scale(finished_run, scans, output)
    assert "pictures in 3 parts, 2 already predicted\n" in capsys.readouterr().out
    (output / "_job.json").write_text('{"asked": {}, "parts": 1}')
    with pytest.raises(UsageError, match="holds predictions with another checkpoint; choose another folder"):
        scale(finished_run, scans, output)
    (output / "_job.json").write_text('{"parts": 1}')
    with pytest.raises(JobError, match=r"_job\.json is damaged: 'asked'; restore it, or delete it"):
        scale(finished_run, scans, output)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_that_another_user_has_begun_is_rejected(finished_run: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "digits"
    (output / "_done").mkdir(parents=True)
    (output / "_job.json").write_text('{"parts": {}}')
    os.chown(output / "_job.json", 12345, 12345)
    with pytest.raises(UsageError, match=f"^--output {output}/ was begun by another user; choose another folder$"):
        scale(finished_run, scans, output)


def test_an_error_in_an_actor_is_one_line_and_a_killed_actor_is_replaced(
    ray_address: str, finished_run: Path, scans: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    killed = tmp_path / "killed"
    code = write(
        f"""
        import os
        from pathlib import Path
        from mnist_ray.mnist import MNIST

        class Dying(MNIST):
            def prepare(self, inputs, generator):
                if not Path({str(killed)!r}).exists():
                    Path({str(killed)!r}).touch()
                    os._exit(1)
                return super().prepare(inputs, generator)

        class Dead(MNIST):
            def prepare(self, inputs, generator):
                os._exit(1)
        """,
        "dying.py",
    )
    scale(finished_run, scans, tmp_path / "digits", "--workload", f"{code}:Dying")
    assert len(pd.read_parquet(tmp_path / "digits")) == 23
    with pytest.raises(JobError, match=r"^cannot predict part-0000\d.parquet: 4 actors died: .*; rerun"):
        scale(finished_run, scans, tmp_path / "dead", "--workload", f"{code}:Dead", "--num-actors", "1")
    wrong = write(
        "from mnist_ray.mnist import MNIST\n\n\nclass Wrong(MNIST):\n"
        "    def prepare(self, inputs, generator):\n        return inputs.nothing\n",
        "wrong.py",
    )
    with pytest.raises(JobError, match=r"^Wrong, a prediction: AttributeError: .*nothing.* \(wrong.py, line 6\); "):
        scale(finished_run, scans, tmp_path / "other", "--workload", str(wrong))


@pytest.mark.parametrize("columns", [(), ("x", "y"), ("y", "x")])
def test_columns_that_the_workload_names_are_found_in_any_order(columns: tuple[str, ...], tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [2.0], "id": [7.0], "x": [1.0]}), tmp_path / "a.parquet")
    predicted(NAMED, tmp_path / "a.parquet", tmp_path / "out", columns)
    assert pd.read_parquet(tmp_path / "out" / "a.parquet").prediction.tolist() == [21.0]


def test_parquet_keeps_types_and_names_and_rows_with_nulls_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    at = pa.array([1, 2, 3, 4, 5], pa.timestamp("us", "UTC"))
    lists = [[1, 2], None, [3, 4], [1, 2, 3], [5, 6]]
    table = pa.table({"at": at, "x": pa.array(lists, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "in" / "more" / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "in" / "empty.parquet")
    (tmp_path / "in" / "cut.parquet").write_bytes((tmp_path / "in" / "more" / "a.parquet").read_bytes()[:100])
    predicted(Sums(), tmp_path / "in", tmp_path / "out", ("x",))
    written = pq.read_table(tmp_path / "out" / "more" / "a.parquet")
    assert written.select(["at", "x"]).equals(table.take([0, 2, 4]))
    assert written["prediction"].to_pylist() == [3.0, 7.0, 11.0]
    assert pq.read_table(tmp_path / "out" / "empty.parquet").schema.equals(written.schema)
    reasons = unreadable(tmp_path / "out")
    assert reasons["more/a.parquet, row 2"] == "column x has nulls"
    assert reasons["more/a.parquet, row 4"].startswith("Sums, a prediction: RuntimeError")
    assert reasons["cut.parquet"].startswith("the file cannot be read: ")
    assert not (tmp_path / "out" / "cut.parquet").exists()


def test_texts_are_continued(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ab")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    predicted(Echo(), tmp_path / "in", tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out").to_dict("records") == [{"file": "a.txt", "prediction": "abab"}]
    assert unreadable(tmp_path / "out") == {"b.txt": "no text in UTF-8"}
    pq.write_table(pa.table({"id": [1, 2], "text": ["ab", None]}), tmp_path / "texts.parquet")
    predicted(Echo(), tmp_path / "texts.parquet", tmp_path / "rows", ("text",))
    assert pd.read_parquet(tmp_path / "rows").prediction.tolist() == ["abab"]


def test_tables_that_differ_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 2), np.float32))
    for name, columns in {
        "a": {"x": tensors},
        "b": {"y": tensors},
        "c": {"x": tensors, "prediction": pa.array([1, 2])},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{name}.parquet")
    predicted(Sums(), tmp_path / "in", tmp_path / "out", ("x",))
    assert pq.read_table(tmp_path / "out" / "a.parquet")["prediction"].to_pylist() == [2.0, 2.0]
    reasons = unreadable(tmp_path / "out")
    assert reasons["b.parquet"] == "the file cannot be read: it has no column x"
    assert "several columns prediction, or one that predictions add" in reasons["c.parquet"]


def test_a_link_in_the_output_does_not_lead_elsewhere(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "out" / "_temporary").symlink_to(tmp_path / "own")
    with pytest.raises(JobError, match=r"^cannot predict part-00000\.parquet: Too many levels of symbolic links"):
        predicted(mnist(), scans, tmp_path / "out")
    assert not [*(tmp_path / "own").iterdir()]


def test_a_failed_write_leaves_no_file_with_the_parts_name(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(JobError, match=r"^cannot predict part-00000.parquet: No space left on device"):
        predicted(mnist(), scans, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.parquet")]
    assert not (tmp_path / "out" / "_done").exists()


NAMED = Weighted(metadata={"column_names": ["x", "y"]})
TABLE = {"id": [1], "image": [b""], "other": [b""], "numbers": [[1.0, 2.0]]}


@pytest.mark.parametrize(
    ("workload", "files", "columns", "message"),
    [
        (
            mnist(),
            {"a.parquet": TABLE},
            (),
            "has several columns: choose with --column among id, image, other, numbers",
        ),
        (mnist(), {"a.parquet": TABLE}, ("images",), "has no column images, only id, image, other, numbers"),
        (mnist(), {"a.parquet": TABLE, "a.png": {}}, (), "has pictures and Parquet: choose by a pattern, such as"),
        (mnist(), {"a.png": {}}, ("image",), "--column is for tables, but"),
        (mnist(), {"a.parquet": {"image": [b""], "prediction": [1]}}, (), "already has a column prediction: rename it"),
        (Sums(), {"a.png": {}}, (), "has no files that Sums can take: Parquet"),
        (NAMED, {"a.parquet": {"x": [1], "z": [1]}}, (), "has no column y, only x, z"),
        (NAMED, {"a.parquet": {"x": [1], "y": [1]}}, ("x",), "Weighted takes the columns x, y; name all of them, or"),
        (Sums(), {}, (), "has no picture, text or Parquet files"),
    ],
)
def test_what_a_workload_cannot_take_is_one_line(
    tmp_path: Path, workload: Workload, files: dict[str, Any], columns: tuple[str, ...], message: str
) -> None:
    for name, table in files.items():
        pq.write_table(pa.table(table), tmp_path / name) if table else (tmp_path / name).touch()
    with pytest.raises(UsageError, match=re.escape(message)):
        find_inputs(str(tmp_path), workload, columns)


def test_the_column_is_a_tables_only_one(tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE).select(["image"]), tmp_path / "a.parquet")
    assert find_inputs(str(tmp_path), mnist(), ()).columns == ("image",)


def test_impossible_flags_are_one_line(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    run, given, other = ("--run", str(finished_run)), ("--input", str(tmp_path / "a.png")), str(tmp_path / "out")
    for flags, message in (
        ((), "name images or folders or, for data at scale, --input and --output"),
        ((*given, "a.png", "--output", other), "name images or folders or, for data at scale, --input and --output"),
        (given, "--input and --output belong together: give both"),
        ((*given, "--output", str(tmp_path / "full")), r"holds other files \(mine.txt\); choose an empty folder"),
    ):
        with pytest.raises(UsageError, match=message):
            run_main("predict", *run, *flags)


def test_training_does_not_import_predictions() -> None:
    for file in (ROOT / "mnist_ray").rglob("*.py"):
        if file.parent.name not in ("predictions", "tools") and file.name not in ("cli.py", "api.py", "__init__.py"):
            assert "mnist_ray.predictions" not in file.read_text(encoding="utf-8"), file
