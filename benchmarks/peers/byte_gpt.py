"""What the programs that train examples/gpt.py have in common: its model, its text, its recipe, and a clock."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.splits import splits_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of
from mnist_ray.workload.loading import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"


class Windows(Dataset):
    """Windows of the text: pairs of bytes (T,) and the bytes that follow them, (T,), both int64."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self._split[index]
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    folder: Path
    workload: Workload
    config: TrainConfig
    train: Windows
    validation: Windows
    test: Windows

    @property
    def steps_of_tenth(self) -> int:
        """The steps after which a program validates and saves a checkpoint, as this project's job does."""
        return -(-self.config.total_steps(0) // 10)

    @property
    def is_bf16(self) -> bool:
        """Whether to train in bf16."""
        return self.config.precision == "bf16"

    @property
    def batches(self) -> list[list[int]]:
        """The examples of each step, as this project's job takes them."""
        config, size = self.config, len(self.train)
        steps_per_pass = config.steps_per_pass(size)
        passes = range(-(-config.total_steps(0) // steps_per_pass))
        requests = chain.from_iterable(
            ShardedBatchSampler(size, config.batch_size, seed=config.seed, pass_number=number) for number in passes
        )
        return [request.indices.tolist() for request in requests]

    def optimizer_and_scheduler(self, model: torch.nn.Module, *, fused: bool = True) -> tuple[Any, Any]:
        """Return the example's AdamW, and its cosine after a warm-up."""
        optimizer = self.workload.create_optimizer(model, self.config)
        if not fused:
            optimizer = torch.optim.AdamW([{**group, "fused": None} for group in optimizer.param_groups])
        return optimizer, self.workload.create_scheduler(optimizer, self.config, self.config.total_steps(0))


def job_of(arguments: list[str] | None = None) -> Job:
    """Read the command line: TEXTS, FOLDER for checkpoints, the size of the model, the steps and the precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--validation-size", type=int)
    args = parser.parse_args(arguments)
    example = load(str(EXAMPLE))
    workload = example(example.Settings(text_folder=args.texts, depth=args.depth, width=args.width))
    recipe = {**example.recipes["default"], "num_steps": args.num_steps, "precision": args.precision}
    splits = splits_of(data_of(workload), args.validation_size)
    windows = map(Windows, (splits.train, splits.validation, splits.test))
    return Job(args.folder, workload, TrainConfig(**recipe), *windows)


class StepClock:
    """Takes the time of training steps, without the first tenth."""

    def __init__(self, job: Job) -> None:
        self._job, self._ends = job, [time.perf_counter()]

    def step(self) -> None:
        """Note the end of a step."""
        self._ends.append(time.perf_counter())

    def report(self, validation_loss: float, test_loss: float) -> None:
        """Print the rate and the losses as JSON. Steps are left out before which the program validated."""
        tenth, settings = self._job.steps_of_tenth, self._job.workload.settings
        steps = [end - start for number, (start, end) in enumerate(pairwise(self._ends)) if number % tenth]
        warm = steps[tenth - 1 :]
        tokens = len(warm) * self._job.config.batch_size * settings.length
        print(json.dumps({"tokens_per_s": tokens / sum(warm), "loss": validation_loss, "test_loss": test_loss}))
