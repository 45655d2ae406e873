"""The workloads under examples/, each trained and used."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

import mnist_ray
from tests.conftest import ROOT, as_flags, run_main

SMALL: dict[str, dict[str, Any]] = {
    "diabetes": {"num_epochs": 3, "batch_size": 8},
    "shapes": {"num_images": 3000, "noise": 0, "num_epochs": 3, "batch_size": 32, "learning_rate": 5e-3, "width": 8},
}


def flags_of(example: str, storage: Path, **more: Any) -> list[str]:
    small = {**SMALL[example], "precision": "fp32", "storage_path": storage, "cpus_per_worker": 1, **more}
    return as_flags({"workload": ROOT / "examples" / f"{example}.py", **small})


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


@pytest.fixture(scope="module", params=SMALL)
def example(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def run(example: str, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers."""
    storage = tmp_path_factory.mktemp(example)
    run_main("train", *flags_of(example, storage, num_workers=2, run_name="two"))
    return storage / "two"


def test_it_learns_and_writes_its_files(run: Path, example: str) -> None:
    result = result_of(run)
    assert result["num_workers"] == 2
    if example == "diabetes":
        assert result["test_r2"] > 0.3
    else:
        assert result["test_accuracy"] > 0.3
        assert len(result["confusion_matrix"]) == 6
    own = ["rmse", "errors"] if example == "diabetes" else ["mistakes"]
    assert {path.stem for path in (run / "pictures").iterdir()} >= {"loss", "predictions", *own}
    assert (run / "workload.py").read_text() == (ROOT / "examples" / f"{example}.py").read_text()
    config = json.loads((run / "config.json").read_text())
    assert (Path(config["workload"]).name, "width" in config) == (f"{example}.py", True)


def test_a_regression_is_evaluated_and_shapes_take_pictures(
    run: Path, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if example == "diabetes":
        run_main("evaluate", str(run))
        assert f"rmse {result_of(run)['test_rmse']:.4f}, " in capsys.readouterr().out.splitlines()[-1]
    else:
        run_main("predict", str(run / "pictures" / "loss.png"), "--storage-path", str(run.parent))
        assert capsys.readouterr().out.splitlines()[0].endswith("(Shapes)")


def write_pictures(folder: Path, number: int, rows: int) -> None:
    """Write pictures of two classes, dark and light, as docs/workloads.md does, in row groups of ``rows``."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=number).tolist()
    column = []
    for label in labels:
        content = io.BytesIO()
        Image.fromarray(rng.integers(128 * label, 128 * label + 127, (9, 12), dtype=np.uint8)).save(content, "png")
        column.append({"bytes": content.getvalue(), "path": None})
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": column, "label": labels}), folder / "some.parquet", row_group_size=rows)


def test_pictures_in_parquet_are_trained_on_and_evaluated_in_shares(ray_address: str, tmp_path: Path) -> None:
    for split, number in (("train", 600), ("test", 250)):
        write_pictures(tmp_path / "pictures" / split, number, rows=20)
    workload: dict[str, Any] = {"data": str(tmp_path / "pictures"), "num_classes": 2, "size": 8, "width": 4}
    run = mnist_ray.train(
        ROOT / "examples" / "shards.py",
        **workload,
        storage_path=str(tmp_path),
        num_workers=2,
        cpus_per_worker=1,
        num_epochs=2,
        learning_rate=0.05,
        quiet=True,
    )
    assert run.result["num_workers"] == 2
    assert run.metrics["accuracy"] > 0.9
    assert (Path(run.folder.path) / "pictures" / "predictions.png").exists()
    assert mnist_ray.evaluate(run, num_tasks=2) == run.metrics
