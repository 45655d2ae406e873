"""A workload's data, loaded and looked at. Without torch, to be quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from mnist_ray.errors import JobError, UsageError, first_line, with_place
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Arrays, Data, digest_of_files


def load_data(workload: Workload) -> Data:
    """Return a workload's data, and let it know what the model must know of them.

    A workload that knows already, as that of a checkpoint does, is left as it is. Raises UsageError and JobError.
    """
    with placed(workload, "load_data"):
        data = _checked(workload, workload.load_data())
    if not workload.metadata:
        with placed(workload, "metadata_of"):
            workload.metadata = _checked_metadata(workload, workload.metadata_of(data))
    with placed(workload, "check_data"):
        workload.check_data(data)
    return data


def picture_of(workload: Workload, inputs: Any) -> np.ndarray | None:
    """Return what one input looks like; None where it looks like nothing. Raises UsageError where it is no picture."""
    with placed(workload, "as_picture"):
        image = workload.as_picture(inputs)
    if image is None:
        return None
    is_picture = (
        isinstance(image, np.ndarray) and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))
    )
    if not is_picture:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f"{type(workload).__name__}.as_picture is to return uint8 (H, W) or (H, W, 3), not {got}")
    return image


def _checked_metadata(workload: Workload, metadata: object) -> dict[str, Any]:
    """Return metadata that come back from a checkpoint as they were."""
    name = type(workload).__name__
    if not isinstance(metadata, dict):
        raise UsageError(f"{name}.metadata_of returned {type(metadata).__name__}, not a dict")
    for key, value in metadata.items():
        try:
            is_kept = isinstance(key, str) and json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            is_kept = False
        if not is_kept:
            raise UsageError(f"{name}: fact {key!r} is no JSON: use numbers, texts, lists and dicts, as array.tolist()")
    return metadata


def _checked(workload: Workload, data: object) -> Data:
    """Return what ``load_data`` has returned. Raises UsageError where that is no data, or there are no examples."""
    name = type(workload).__name__
    if not isinstance(data, Data):
        raise UsageError(f"{name}.load_data returned {type(data).__name__}, not mnist_ray.workload.Data")
    for split in ("train", "test", "validation"):
        examples = getattr(data, split)
        if examples is None and split == "validation":
            continue
        if not isinstance(examples, Arrays) and not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
            kind = type(examples).__name__
            raise UsageError(f"{name}.load_data: {split} is of type {kind}, neither Arrays nor a Dataset with a length")
        if isinstance(examples, Arrays):
            _check_arrays(f"{name}.load_data: {split}", examples)
        if len(examples) == 0:
            raise UsageError(f"{name}.load_data: {split} holds no examples")
    try:
        data = dataclasses.replace(data, files=tuple(data.files))
        digest_of_files(data.files)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"{name}.load_data: files are to be paths of files: {first_line(error)}") from error
    return data if data.name else dataclasses.replace(data, name=name)


def _check_arrays(place: str, arrays: Arrays) -> None:
    for what, array in (("inputs", arrays.inputs), ("targets", arrays.targets)):
        if not isinstance(array, np.ndarray) or array.ndim == 0:
            kind = "a single number" if isinstance(array, np.ndarray) else type(array).__name__
            raise UsageError(f"{place}: {what} are to be a NumPy array (N, ...), not {kind}")
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{place}: {what} are to be numbers, not of dtype {array.dtype}")
    if len(arrays.inputs) != len(arrays.targets):
        raise UsageError(f"{place} has {len(arrays.inputs):,} inputs but {len(arrays.targets):,} targets")


@contextlib.contextmanager
def placed(workload: Workload, what: str) -> Iterator[None]:
    """Say in one line what the user's code raised, and where."""
    assert workload.source is not None
    try:
        yield
    except (UsageError, JobError):
        raise
    except Exception as error:
        raise UsageError(
            f"{type(workload).__name__}, {what}: {with_place(error, workload.source.folder, or_here=False)}"
        ) from error
