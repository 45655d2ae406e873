"""The workloads under examples/, each trained, killed, resumed, swept, evaluated, exported."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

import mnist_ray
from mnist_ray.errors import UsageError
from tests.conftest import ROOT, as_flags, run_and_act, run_job, run_main

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


def weights_of(run: Path) -> bytes:
    last = max(run.glob("checkpoint_epoch*"))
    return (last / "model.safetensors").read_bytes()


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


@pytest.mark.long
def test_killed_and_resumed_its_weights_are_the_same(run: Path, example: str, ray_address: str, tmp_path: Path) -> None:
    flags = flags_of(example, tmp_path, num_workers=2, run_name="kill")
    run_and_act(psutil.Process.kill, "epoch 2/", *flags, address=ray_address, status=-9)
    assert not (tmp_path / "kill" / "result.json").exists()
    done = run_job("train.py", "--resume", "--run-name", "kill", "--storage-path", str(tmp_path), address=ray_address)
    assert done.returncode == 0, done.stderr
    # So short a run may have finished its last epoch when it was killed.
    assert "continuing in epoch" in done.stdout or "all epochs are trained already" in done.stdout
    assert weights_of(tmp_path / "kill") == weights_of(run)


@pytest.mark.long
def test_a_sweep_searches_its_own_setting_and_trains_the_best(example: str, ray_address: str, tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL[example].items() if name not in ("width", "learning_rate")}
    flags = as_flags({**small, "num_epochs": 1, "precision": "fp32", "storage_path": tmp_path, "run_name": "sweep"})
    space = ["--sweep", "width=2,4", "learning_rate=log:1e-3:1e-2", "--num-trials", "3", "--num-confirmed", "0"]
    run_main("tune", "--workload", str(ROOT / "examples" / f"{example}.py"), *flags, *space)
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {row["width"] for row in rows} <= {"2", "4"}
    best = json.loads((tmp_path / "sweep" / "best.json").read_text())
    assert str(best["width"]) in {row["width"] for row in rows}
    assert result_of(tmp_path / "sweep")["num_workers"] == 1
    tried = json.loads((tmp_path / "sweep" / "config.json").read_text())
    assert tried["width"] == best["width"]
    assert "pictures/sweep.png" in {str(path.relative_to(tmp_path / "sweep")) for path in tmp_path.rglob("*.png")}


@pytest.mark.long
def test_it_is_evaluated_reported_and_exported_by_its_run_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("evaluate", str(run))
    monitor = next(name for name in ("test_accuracy", "test_rmse") if name in result_of(run))
    value = result_of(run)[monitor]
    said = capsys.readouterr().out.splitlines()[-1]
    assert (f"{value:.2%}" if monitor == "test_accuracy" else f"{value:.4f}") in said
    before = (run / "report.html").read_text()
    run_main("report", str(run))
    assert (run / "report.html").read_text() == before
    run_main("export", str(run), "--output", str(tmp_path / "model.pt2"))
    assert "differ by at most" in capsys.readouterr().out


def test_shapes_take_pictures_and_a_table_does_not(run: Path, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = (str(run / "pictures" / "loss.png"), "--storage-path", str(run.parent))
    if example == "shapes":
        run_main("predict", *given)
        assert capsys.readouterr().out.splitlines()[0].endswith("(Shapes)")
    else:
        with pytest.raises(UsageError, match="Diabetes does not take pictures"):
            run_main("predict", *given)


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
