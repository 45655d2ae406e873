"""What a trained model answers to the user's own pictures: ``jobs/predict.py`` once its flags are read."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn

from mnist_ray import config as settings
from mnist_ray.cluster.connection import connect, quiet_ray, usable_cores
from mnist_ray.config import PredictionConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.runs.evaluation import find_checkpoint
from mnist_ray.storage import write_file
from mnist_ray.training.checkpoint import fetch
from mnist_ray.training.engine import to_input
from mnist_ray.workload.mnist.photos import as_it_is, read_image, to_mnist

Prepare = Callable[[Image.Image], np.ndarray]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
"""Of the files that are taken from a folder."""
_BATCH_SIZE = 64
_MOST_HERE = 256  # more pictures than this are worth starting Ray
_MOST_DRAWN = 240


@dataclass(frozen=True)
class Answer:
    """What the model says to one file."""

    file: str
    image: np.ndarray | None = None
    """(28, 28) uint8: what the model saw."""
    digits: tuple[int, ...] = ()
    """The three most probable, the best first; none where there is an error."""
    probabilities: tuple[float, ...] = ()
    error: str | None = None
    """Why there is no answer."""

    def is_sure(self, threshold: float) -> bool:
        """Whether the best digit is at least that probable."""
        return bool(self.probabilities) and self.probabilities[0] >= threshold

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        best, *others = zip(self.digits, self.probabilities, strict=True)
        return {
            "file": self.file,
            "digit": best[0],
            "probability": round(best[1], 6),
            "unsure": not self.is_sure(threshold),
            "next": [{"digit": digit, "probability": round(probability, 6)} for digit, probability in others],
        }


def predict(flags: Mapping[str, Any]) -> None:
    """Print the model's answer to each picture. Raises JobError at the end where there were files without one."""
    quiet_ray()
    config = settings.build(PredictionConfig, flags)
    checkpoint = find_checkpoint(flags.get("run"), flags)
    model, _ = fetch(checkpoint.filesystem, checkpoint.path)
    files = list(find_files(flags["images"]))
    if not config.json:
        print(f"checkpoint {checkpoint.path}")
    answers = []
    for answer in answer_all(model, files, as_it_is if config.as_is else to_mnist):
        answers.append(answer)
        _print(answer, config)
    if config.grid is not None:
        _draw(answers, config)
    failed = sum(answer.error is not None for answer in answers)
    if failed:
        raise JobError(f"no answer to {failed:,} of {len(answers):,} files")


def find_files(given: Iterable[str]) -> Iterator[Path]:
    """Yield the files that were given, and of folders the pictures in them at any depth, sorted."""
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            yield from found or [path]  # a folder without pictures is answered as a file that cannot be read
        else:
            yield path


def answer_all(model: nn.Module, files: Sequence[Path], prepare: Prepare = to_mnist) -> Iterator[Answer]:
    """Yield the answer to each file, in their order; many are answered by tasks on Ray.

    ``prepare`` makes of a picture what the model sees.
    """
    batches = (files[start : start + _BATCH_SIZE] for start in range(0, len(files), _BATCH_SIZE))
    contents = ([(str(file), _read(file)) for file in batch] for batch in batches)
    if len(files) <= _MOST_HERE:
        torch.set_num_threads(usable_cores())
        for batch in contents:
            yield from answer_batch(model, batch, prepare)
        return
    with connect(WorkerConfig(), verbose=False), Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("pictures", total=len(files))
        for answers in _on_ray(model, contents, prepare):
            progress.advance(bar, len(answers))
            yield from answers


def _on_ray(
    model: nn.Module, batches: Iterator[list[tuple[str, bytes | str]]], prepare: Prepare
) -> Iterator[list[Answer]]:
    """Answer batches by tasks, of which no more wait than keep the cluster busy: the files' content is in memory."""
    reference = ray.put(model)
    most_waiting = 2 * int(ray.cluster_resources().get("CPU", 1))
    tasks = (_answer_task.remote(reference, batch, prepare) for batch in batches)
    waiting = collections.deque(itertools.islice(tasks, most_waiting))
    while waiting:
        yield ray.get(waiting.popleft())
        waiting.extend(itertools.islice(tasks, 1))


@ray.remote(num_cpus=1)
def _answer_task(model: nn.Module, batch: list[tuple[str, bytes | str]], prepare: Prepare) -> list[Answer]:
    torch.set_num_threads(1)
    return answer_batch(model, batch, prepare)


def _read(file: Path) -> bytes | str:
    """Return a file's content, or as text why it cannot be read."""
    if file.is_dir():
        return "is a folder without pictures"
    try:
        return file.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def answer_batch(
    model: nn.Module, batch: Sequence[tuple[str, bytes | str]], prepare: Prepare = to_mnist
) -> list[Answer]:
    """Answer files of which each has its content, or as text why there is none."""
    seen = [_see(file, content, prepare) for file, content in batch]
    images = [answer.image for answer in seen if answer.image is not None]
    if not images:
        return seen
    with torch.inference_mode():
        best = model(to_input(torch.from_numpy(np.stack(images)))).softmax(1).topk(3)
    rows = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    answers = []
    for answer in seen:
        if answer.image is not None:
            digits, probabilities = next(rows)
            answer = dataclasses.replace(answer, digits=tuple(digits), probabilities=tuple(probabilities))
        answers.append(answer)
    return answers


def _see(file: str, content: bytes | str, prepare: Prepare) -> Answer:
    """Return what the model is to see of a file, or why it cannot."""
    if isinstance(content, str):
        return Answer(file, error=content)
    try:
        return Answer(file, prepare(read_image(content)))
    except UsageError as error:
        return Answer(file, error=str(error))


def _print(answer: Answer, config: PredictionConfig) -> None:
    if config.json:
        print(json.dumps(answer.to_dict(config.threshold)))
    elif answer.error is not None:
        print(f"{answer.file}: {answer.error}")
    else:
        best, *others = zip(answer.digits, answer.probabilities, strict=True)
        then = ", ".join(f"{digit} {probability:.1%}" for digit, probability in others)
        unsure = "" if answer.is_sure(config.threshold) else "  unsure"
        print(f"{answer.file}: {best[0]}  {best[1]:.1%} (then {then}){unsure}")


def _draw(answers: Sequence[Answer], config: PredictionConfig) -> None:
    from mnist_ray.display import pictures  # imports matplotlib, which answers need not wait for

    assert config.grid is not None
    images, captions = [], []
    for answer in answers:
        if answer.image is not None:
            images.append(answer.image)
            mark = "" if answer.is_sure(config.threshold) else "?"
            captions.append(f"{answer.digits[0]}{mark} {answer.probabilities[0]:.0%}")
    if not images:
        raise JobError(f"no picture of a digit to draw in {config.grid}")
    write_file(config.grid, pictures.digits(np.stack(images[:_MOST_DRAWN]), captions[:_MOST_DRAWN]))
