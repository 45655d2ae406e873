"""The workloads under examples/, each trained and used."""

import csv
import json
import math
import runpy
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mnist_ray
from mnist_ray.data.data import Arrays
from mnist_ray.errors import JobError
from mnist_ray.report.columns import read_columns
from mnist_ray.report.run_files import read_numbers
from mnist_ray.workload.loading import load
from tests.conftest import ROOT, as_flags, callback_at, folder_at, run_main, write_pictures

SMALL: dict[str, dict[str, Any]] = {
    "diabetes": {"num_epochs": 3, "batch_size": 8},
    "shapes": {"num_images": 3000, "noise": 0, "num_epochs": 3, "batch_size": 32, "learning_rate": 5e-3, "width": 8},
}

SPOTS = '''
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Spots(Classification):
    """Bright above or below; three labels are wrong, one example comes twice, one is also in the test set."""

    recipes = {"default": {"num_epochs": 3, "batch_size": 10, "learning_rate": 0.02, "precision": "fp32"}}

    def load_data(self):
        random = np.random.default_rng(0)
        targets = np.arange(150) % 2
        pictures = random.integers(0, 100, (150, 6, 6)).astype(np.uint8)
        pictures[targets == 0, :3] += 100
        pictures[targets == 1, 3:] += 100
        train, labels = np.concatenate([pictures[:120], pictures[5:6]]), np.append(targets[:120], targets[5])
        labels[[3, 50, 97]] = 1 - labels[[3, 50, 97]]
        test = np.append(pictures[120:], pictures[8:9], 0)
        return Data(Arrays(train, labels), Arrays(test, np.append(targets[120:], 0)))

    def create_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))

    def prepare(self, inputs, generator):
        return inputs.float() / 255

    def as_picture(self, inputs):
        return inputs
'''


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
    own, report = (
        ["rmse"] if example == "diabetes" else ["The most confident mistakes"],
        (run / "report.html").read_text(),
    )
    assert [title for title in ("loss", "Predictions", *own) if f"<h2>{title}" not in report] == []
    code = json.loads((run / "origin.json").read_text())["workload_code"]
    assert code == (ROOT / "examples" / f"{example}.py").read_text().splitlines()
    config = json.loads((run / "config.json").read_text())
    assert (Path(config["workload"]).name.partition(":")[0], "width" in config) == (f"{example}.py", True)


def test_a_regression_is_evaluated_and_shapes_take_pictures(
    run: Path, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if example == "diabetes":
        run_main("evaluate", str(run))
        assert f"rmse {result_of(run)['test_rmse']:.4f}, " in capsys.readouterr().out.splitlines()[-1]
    else:
        Image.new("RGB", (64, 64)).save(run.parent / "black.png")
        run_main("predict", str(run.parent / "black.png"), "--storage-path", str(run.parent))
        assert capsys.readouterr().out.splitlines()[0].endswith("(Shapes)")


def test_a_gan_shows_what_it_draws_and_a_contrastive_loss_tells_digits_apart(tmp_path: Path) -> None:
    found = {}
    for name in ("gan", "contrastive"):
        small: dict[str, Any] = {"limit": 0.02, "num_epochs": 2, "precision": "fp32", "num_workers": 0}
        where = {"workload": ROOT / "examples" / f"{name}.py", "storage_path": tmp_path, "run_name": name}
        run_main("train", *as_flags({**where, **small}))
        found[name] = result_of(tmp_path / name)
    report = (tmp_path / "gan" / "report.html").read_text()
    titles = ("Fake images", "discriminator loss", "generator loss")
    assert [title for title in titles if f"<h2>{title}" not in report] == []
    rows = read_numbers(folder_at(tmp_path / "gan"), "metrics.csv", "discriminator_loss", "generator_loss")
    assert len(rows) == 2
    assert read_columns(folder_at(tmp_path / "gan"))["fake"].shape == (200, 28, 28)
    assert math.isfinite(found["gan"]["test_distance"])
    assert found["contrastive"]["test_probe"] > 0.3


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
    assert "<h2>Predictions</h2>" in (run.folder.read_text("report.html") or "")
    assert mnist_ray.evaluate(run, num_tasks=2) == run.metrics


def gpt_flags(storage: Path, texts: Path, **more: Any) -> list[str]:
    small = {"text_folder": texts, "length": 16, "depth": 1, "width": 64, "batch_size": 16, "learning_rate": 1e-2}
    flags = {"precision": "fp32", "warmup_steps": 0, "cpus_per_worker": 1, "storage_path": storage, **small, **more}
    return as_flags({"workload": ROOT / "examples" / "gpt.py", **flags})


def test_a_gpt_is_trained_sharded_resumed_exported_and_continues_a_text(
    ray_address: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = callback_at(tmp_path / "stops.py", "wants_stop(self)", "return not os.path.exists(__file__ + '.go')")
    flags = gpt_flags(tmp_path / "runs", texts, num_steps=60, validate_every=30, run_name="gpt", callback=stops)
    with pytest.raises(JobError, match="a callback has stopped the training"):
        run_main("train", *flags, "--num-workers", "2", "--strategy", "fsdp")
    (tmp_path / "stops.py.go").touch()
    run_main("train", *flags, "--num-workers", "1", "--strategy", "fsdp", "--resume")
    said = capsys.readouterr().out
    assert "continuing in epoch 1 after step " in said
    run = tmp_path / "runs" / "gpt"
    assert result_of(run)["test_bits_per_byte"] < 2.5

    run_main("predict", "the mouse", "--run", str(run))
    assert capsys.readouterr().out.splitlines()[-1].startswith("the mouse ")
    run_main("export", str(run), "--output", str(tmp_path / "gpt.pt2"))
    assert "windows (N, 16) int64 to outputs (N, 16, 256) float32" in capsys.readouterr().out


def test_a_gpt_continues_a_text_after_each_validation(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = f"{ROOT / 'examples' / 'gpt.py'}:Sample(prompt='the mouse')"
    flags = gpt_flags(tmp_path, texts, num_steps=4, validate_every=2, num_workers=0, callback=callback)
    run_main("train", *flags)
    assert capsys.readouterr().out.count(", it writes: 'the mouse") == 2


def test_a_gpt_is_searched_by_steps(
    ray_address: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"num_steps": 16, "validate_every": 8, "run_name": "swept", "num_trials": 2, "num_confirmed": 0}
    run_main("tune", *gpt_flags(tmp_path / "runs", texts, **more), "--sweep", "dropout=0,0.1")
    said = capsys.readouterr().out
    assert "after 0.25/2 epochs" in said
    assert result_of(tmp_path / "runs" / "swept")["test_bits_per_byte"] < 6


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_model_of_hugging_face_is_fine_tuned_and_loaded_again(
    lora_rank: int, small_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_folder = tmp_path / "base"
    torch.manual_seed(0)
    shutil.copytree(small_llm, model_folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small_llm)).save_pretrained(model_folder)
    flags = {"model_folder": model_folder, "texts": small_llm / "texts.jsonl", "lora_rank": lora_rank}
    flags |= {"num_workers": 0, "num_epochs": 4, "learning_rate": 2e-2, "precision": "fp32", "run_name": "tuned"}
    example = ROOT / "examples" / "finetune.py"
    run_main("train", *as_flags({"workload": example, "storage_path": tmp_path / "runs", **flags}))
    run = tmp_path / "runs" / "tuned"
    assert result_of(run)["test_loss"] < 1.75, "the one of a model that knows nothing is 1.95"
    monkeypatch.setattr("sys.argv", [str(example), str(run), str(tmp_path / "saved")])
    runpy.run_path(str(example), run_name="__main__")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ours = mnist_ray.load_run(run).load_model()
    assert torch.equal(loaded(**inputs).logits, ours(inputs))
    assert (tmp_path / "saved" / "adapter_config.json").exists() == bool(lora_rank)


def test_an_audit_finds_the_wrong_labels_and_the_duplicates(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spots.py"
    file.write_text(SPOTS)
    storage, folder = str(tmp_path / "runs"), tmp_path / "audit"
    run_main("train", "--workload", str(file), "--folds", "3", "--storage-path", storage, "--run-name", "cv")
    monkeypatch.setattr("sys.argv", ["audit.py", "cv", "--storage-path", storage, "--output", str(folder)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / "audit.py"), run_name="__main__")
    said = capsys.readouterr().out
    with (folder / "audit.csv").open() as table:
        found = [(row["kind"], int(row["place"])) for row in csv.DictReader(table) if row["leave_out"] == "yes"]
    assert {("label", place) for place in (3, 50, 97)} <= {*found}
    assert [pair for pair in found if pair[0] != "label"] == [("duplicate", 120), ("in test", 8)]
    assert (folder / "audit.html").read_text().count("<img src='data:image/png;base64,") == len(found)
    names: dict[str, Any] = {"csv": csv, "np": np, "Arrays": Arrays}
    data: Any = load(str(file))(None).load_data().train
    exec(
        textwrap.dedent(said.partition("\n")[2]), names | (own := {"inputs": data.inputs, "targets": data.targets}), own
    )
    assert len(own["train"]) == len(data) - len({place for _, place in found})
