"""Small jobs of every example, on a GPU or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnist_ray.report.run_files import read_csv
from tests.conftest import ROOT, as_flags, folder_at, run_main, write_pictures


@pytest.fixture
def examples(small_data: Path, texts: Path, small_llm: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The flags of small jobs, by the name of the example."""
    for split, number in (("train", 60), ("test", 25)):
        write_pictures(tmp_path / "pictures" / split, number, rows=20)
    return {
        "mnist": {"data_dir": small_data, "limit": 0.1, "ema_decay": 0.9, "clip_grad_norm": 1, "micro_batch_size": 9},
        "digits": {"data_dir": small_data, "limit": 0.1, "recipe": "robust"},
        "shapes": {"num_images": 120, "width": 4, "ema_decay": 0.9},
        "diabetes": {},
        "gpt": {"text_folder": texts, "length": 16, "depth": 1, "width": 64, "num_steps": 25, "warmup_steps": 5},
        "finetune": {"model_folder": small_llm, "texts": small_llm / "texts.jsonl", "lora_rank": 2},
        "shards": {"data": tmp_path / "pictures", "num_classes": 2, "size": 8, "width": 4},
    }


Train = Callable[..., Path]


@pytest.fixture
def train(examples: dict[str, dict[str, Any]], tmp_path: Path) -> Train:
    """Train an example under a run's name, without Ray if no flag asks for it; return the run's folder."""

    def run(example: str, name: str, use_gpu: str, *switches: str, **more: Any) -> Path:
        flags: dict[str, Any] = {"num_workers": 0, "cpus_per_worker": 1, "precision": "fp32", "batch_size": 20}
        if example != "mnist":
            flags["workload"] = ROOT / "examples" / f"{example}.py"
        if example != "gpt":
            flags["num_epochs"] = 2
        flags |= {**examples[example], "storage_path": tmp_path / "runs", "run_name": name, "use_gpu": use_gpu, **more}
        run_main("train", *as_flags(flags), *switches)
        return tmp_path / "runs" / name

    return run


def losses(run: Path) -> list[float]:
    """Return the losses of each epoch, and the one on the test set."""
    epochs = read_csv(folder_at(run), "metrics.csv", ["train_loss", "val_loss"])
    of_epochs = [float(epoch[name]) for epoch in epochs for name in ("train_loss", "val_loss")]
    return [*of_epochs, json.loads((run / "result.json").read_text())["test_loss"]]
