"""What a trained model answers to the user's own pictures: ``jobs/predict.py`` once its flags are read."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress
from torch import nn

from mnist_ray.cluster.connect import connect
from mnist_ray.cluster.plan import usable_cores
from mnist_ray.config import PredictionConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError, count, say, with_place
from mnist_ray.run import find
from mnist_ray.settings import path_of
from mnist_ray.storage import RunFolder, write_file
from mnist_ray.tools.flags import class_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.sources import PICTURES

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, as Pillow names it. For others it would start programs, as Ghostscript for PostScript."""
_BATCH_SIZE = 64
_MOST_HERE = 256  # more pictures than this are worth starting Ray
_MOST_DRAWN = 240
_LONGEST_NAME = 14
_REDUCED_BY = "mnist_ray.reduced_by"
"""Of a picture's ``info``: how much larger it is in its file, where it was decoded smaller."""
_MOST_BYTES = 100_000_000
_MOST_PIXELS = 200_000_000  # the largest cameras' pictures; what unpacks to more is an attack or a mistake
_DRAFT_SIZE = 512  # pixels: a JPEG of more than twice as many is decoded smaller, and faster


@dataclass(frozen=True)
class Answer:
    """What the model says to one file."""

    file: str
    inputs: np.ndarray | None = None
    """What the model saw, as the workload's data have it."""
    answers: tuple[tuple[Any, float], ...] = ()
    """The best few with their probabilities, the best first; none where there is an error."""
    error: str | None = None
    """Why there is no answer."""
    box: tuple[int, int, int, int] | None = None
    """Where it is in the picture: left, top, right, bottom in pixels; None where it is the whole of it."""
    num_marks: int = 1
    """How many things the picture has that could be answered."""

    def is_sure(self, threshold: float) -> bool:
        """Whether the best answer is at least that probable, and about the only thing in the picture."""
        return bool(self.answers) and self.answers[0][1] >= threshold and self.num_marks == 1

    def to_dict(self, noun: str, threshold: float) -> dict[str, Any]:
        """Return what ``--json`` prints; ``noun`` is what an answer is called."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        best, *others = ({noun: answer, "probability": round(p, 6)} for answer, p in self.answers)
        place = {} if self.box is None else {"box": list(self.box)}
        marks = {} if self.num_marks == 1 else {"marks": self.num_marks}
        return {"file": self.file, **place, **best, "unsure": not self.is_sure(threshold), **marks, "next": others}


def predict(given: Sequence[str], found: find.Found, config: PredictionConfig) -> None:
    """Print the model's answer to each picture. Raises JobError at the end where there were files without one."""
    workload = found.workload
    if not workload.answers_pictures:
        raise UsageError(f"{type(workload).__name__} does not answer pictures: it has no read_picture")
    model, skipped = found.load_model(), list[Path]()
    files = list(find_files(given, skipped))
    if not config.json:
        for note in found.notes:
            say(f"note {note}")
        say(f"checkpoint {found.checkpoint.path} ({found.description})")
    answers = []
    for answer in answer_all(workload, model, files, as_is=config.as_is, many=config.many):
        answers.append(answer)
        _print(answer, workload, config)
    if config.grid is not None:
        _draw(answers, workload, config)
    if skipped and not config.json:
        say(f"note {skipped_ones(skipped)}")
    failed = sum(answer.error is not None for answer in answers)
    if failed:
        raise JobError(f"no answer to {failed:,} of {len(files):,} files")


def answers_pictures(run: RunFolder) -> bool:
    """Tell whether a run's workload answers pictures; not where its code cannot be had."""
    try:
        return class_of(run, run.storage_path)(None).answers_pictures
    except UsageError:
        return False


def skipped_ones(files: Sequence[Path]) -> str:
    """Say how many files of folders were skipped, of which kinds, and what reads those that are pictures after all."""
    kinds = collections.Counter(file.suffix.lower() or "no suffix" for file in files)
    shown = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
    advice = (
        "; HEIC is read by the package pillow-heif, which can save it as JPEG"
        if kinds.keys() & {".heic", ".heif"}
        else ""
    )
    return f"skipped {count(len(files), 'file')}, of no known format: {shown}{advice}"


def find_files(given: Iterable[str], skipped: list[Path] | None = None) -> Iterator[Path]:
    """Yield the files that were given, and of folders the pictures in them at any depth, sorted.

    What else is in the folders is added to ``skipped``.
    """
    for name in given:
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):  # not Path.is_dir(), which raises where a name is too long or a folder is closed
            files = sorted(file for file in path.rglob("*") if os.path.isfile(file))
            found = [file for file in files if file.suffix.lower() in PICTURES]
            if skipped is not None:
                skipped += [file for file in files if file.suffix.lower() not in PICTURES]
            yield from found or [path]  # a folder without pictures is answered as a file that cannot be read
        else:
            yield path


def answer_all(
    workload: Workload, model: nn.Module, files: Sequence[Path], *, as_is: bool = False, many: bool = False
) -> Iterator[Answer]:
    """Yield the answer to each file, in their order, or with ``many`` to each thing in them.

    Many files are answered by tasks on Ray.
    """
    batches = (files[start : start + _BATCH_SIZE] for start in range(0, len(files), _BATCH_SIZE))
    contents = ([(str(file), _read(file)) for file in batch] for batch in batches)
    if len(files) <= _MOST_HERE:
        torch.set_num_threads(usable_cores())
        for batch in contents:
            yield from answer_batch(workload, model, batch, as_is=as_is, many=many)
        return
    with connect(WorkerConfig()), Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("pictures", total=len(files))
        for answers in _on_ray(workload, model, contents, as_is, many):
            progress.advance(bar, len({answer.file for answer in answers}))
            yield from answers


def _on_ray(
    workload: Workload, model: nn.Module, batches: Iterator[list[tuple[str, bytes | str]]], as_is: bool, many: bool
) -> Iterator[list[Answer]]:
    """Answer batches by tasks, of which no more wait than keep the cluster busy: the files' content is in memory."""
    shared = ray.put(workload), ray.put(model.state_dict())
    most_waiting = 2 * int(ray.cluster_resources().get("CPU", 1))
    tasks = (_answer_task.remote(*shared, batch, as_is, many) for batch in batches)
    waiting = collections.deque(itertools.islice(tasks, most_waiting))
    while waiting:
        yield ray.get(waiting.popleft())
        waiting.extend(itertools.islice(tasks, 1))


@ray.remote(num_cpus=1)
def _answer_task(
    workload: Workload, weights: dict[str, torch.Tensor], batch: list[tuple[str, bytes | str]], as_is: bool, many: bool
) -> list[Answer]:
    torch.set_num_threads(1)
    model = workload.create_model()
    model.load_state_dict(weights)
    return answer_batch(workload, model.eval(), batch, as_is=as_is, many=many)


def _read(file: Path) -> bytes | str:
    """Return a file's content, or as text why it cannot be read."""
    if os.path.isdir(file):
        return "is a folder without pictures"
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):  # else reading may wait for ever, or never end
            return "is no regular file"
        if about.st_size > _MOST_BYTES:
            return f"is too large: {about.st_size / 1e6:,.0f} MB, and at most {_MOST_BYTES / 1e6:.0f}"
        with file.open("rb") as stream:
            return stream.read(_MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read: {getattr(error, 'strerror', error)}"


def answer_batch(
    workload: Workload,
    model: nn.Module,
    batch: Sequence[tuple[str, bytes | str]],
    *,
    as_is: bool = False,
    many: bool = False,
) -> list[Answer]:
    """Answer files of which each has its content, or as text why there is none."""
    seen = [answer for file, content in batch for answer in _see(workload, file, content, as_is, many)]
    inputs = [answer.inputs for answer in seen if answer.inputs is not None]
    if not inputs:
        return seen
    best = iter(answer_inputs(workload, model, np.stack(inputs)))
    return [
        answer if answer.inputs is None else dataclasses.replace(answer, answers=next(best).answers) for answer in seen
    ]


def answer_inputs(workload: Workload, model: nn.Module, inputs: np.ndarray) -> list[Answer]:
    """Answer inputs (N, ...) as the workload's data have them."""
    prepared = workload.prepare(torch.tensor(inputs), None)
    wanted = workload.metadata.get("model_input")
    if wanted is not None and list(prepared.shape[1:]) != wanted["shape"]:
        got = f"{tuple(prepared.shape[1:])}, not {tuple(wanted['shape'])}"
        raise UsageError(f"{type(workload).__name__}.read_picture gives what becomes {got}, as the model takes it")
    with torch.inference_mode():
        said = workload.answers(model(prepared))
    return [Answer("", each, tuple(answers)) for each, answers in zip(inputs, said, strict=True)]


def _see(workload: Workload, file: str, content: bytes | str, as_is: bool, many: bool) -> list[Answer]:
    """Return what the model is to see of a file, or why it cannot: of several things the largest, or ``many``."""
    if isinstance(content, str):
        return [Answer(file, error=content)]
    try:
        picture = read_image(content)
        if as_is:
            return [Answer(file, workload.read_picture(picture, as_is=True))]
        marks = workload.marks(picture)
        if many:
            return [Answer(file, mark.inputs, box=_enlarged(mark.box, picture.info[_REDUCED_BY])) for mark in marks]
        return [Answer(file, max(marks, key=lambda mark: mark.size).inputs, num_marks=len(marks))]
    except UsageError as error:
        return [Answer(file, error=str(error))]
    except Exception as error:
        assert workload.source is not None
        raise UsageError(
            f"{type(workload).__name__}.read_picture: {with_place(error, workload.source.folder)}"
        ) from error


def _enlarged(box: tuple[int, int, int, int] | None, factor: float) -> tuple[int, int, int, int] | None:
    if box is None:
        return None
    left, top, right, bottom = (round(edge * factor) for edge in box)
    return left, top, right, bottom


def read_image(content: bytes) -> Image.Image:
    """Decode a picture and turn it as its EXIF data say. Raises UsageError where it is none, or a huge one."""
    if not content:
        raise UsageError("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of huge pictures, which are refused here, and of damage that does no harm
            file = Image.open(io.BytesIO(content), formats=FORMATS)
            if file.width * file.height > _MOST_PIXELS:
                raise UsageError(f"is too large: {file.width:,}×{file.height:,} pixels")
            width = file.width
            file.draft(None, (_DRAFT_SIZE, _DRAFT_SIZE))
            image = ImageOps.exif_transpose(file)
            image.info[_REDUCED_BY] = width / file.width
    except Image.DecompressionBombError as error:
        raise UsageError("is too large: it would unpack to a huge picture") from error
    except UnidentifiedImageError as error:
        raise UsageError("is no picture of a known format") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise
        raise UsageError(f"is damaged: {error}") from error
    if image.mode == "F" and not _is_finite(np.asarray(image)):
        raise UsageError("has pixels that are infinite or no numbers")
    return image


def _is_finite(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.max() - values.min()))


def _print(answer: Answer, workload: Workload, config: PredictionConfig) -> None:
    if config.json:
        print(json.dumps(answer.to_dict(workload.answer_noun, config.threshold)))  # noqa: T201
    elif answer.error is not None:
        say(f"{answer.file}: {answer.error}")
    else:
        best, *others = answer.answers
        then = ", ".join(f"{other} {probability:.1%}" for other, probability in others)
        unsure = "" if answer.is_sure(config.threshold) else "  unsure"
        if answer.num_marks > 1:
            unsure += f": the largest of {answer.num_marks} marks; --many answers each"
        place = "" if answer.box is None else " at {}, {} to {}, {}".format(*answer.box)
        say(f"{answer.file}{place}: {best[0]}  {best[1]:.1%}" + (f" (then {then})" if then else "") + unsure)


def _short_name(file: str) -> str:
    """Return a file's name as it fits below a picture."""
    name = Path(file).name
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 5]}…{name[-4:]}"


def _draw(answers: Sequence[Answer], workload: Workload, config: PredictionConfig) -> None:
    from mnist_ray.workload.figures import image_grid  # imports matplotlib, which answers need not wait for

    assert config.grid is not None
    images, captions = [], []
    for answer in answers:
        image = None if answer.inputs is None else workload.as_picture(answer.inputs)
        if image is not None:
            images.append(image)
            mark = "" if answer.is_sure(config.threshold) else "?"
            captions.append(f"{answer.answers[0][0]}{mark} {answer.answers[0][1]:.0%}\n{_short_name(answer.file)}")
    if not images:
        has_none = any(answer.inputs is not None for answer in answers)
        reason = f": {type(workload).__name__} has no as_picture" if has_none else ""
        raise JobError(f"no picture to draw in {config.grid}{reason}")
    write_file(path_of(config.grid, "--grid"), image_grid(images[:_MOST_DRAWN], captions[:_MOST_DRAWN]))
