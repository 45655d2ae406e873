"""Loads and checks a workload's class and its data; computes digests of the data. Starts fast, without torch."""

from __future__ import annotations

import bdb
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mnist_ray import config
from mnist_ray.errors import JobError, UsageError, sendable, with_place
from mnist_ray.settings import build, check_known, flag, names_of, values_of
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Arrays, Blocks, Data, Split, Splits
from mnist_ray.workload.memory import owner_of, span_of
from mnist_ray.workload.user_code import Source

DEFAULT = "mnist_ray.mnist"
_API = str(Path(config.__file__).with_name("api.py"))
_MAX_FILES_ASKED = 1000  # at most so many files, evenly spaced, are stat'ed: file servers may be slow
_REMEDIES = {"Tensor": "; call .numpy()", "NoneType": "; without targets, repeat the inputs"}

Reference = str | type[Workload]  # a value of ``--workload``, or a class in this process


def load(reference: Reference) -> type[Workload]:
    """Return the workload in ``FILE.py`` or ``package.module``; ``:NAME`` picks one of several.

    A class is returned as it is. Other processes cannot load a class without a file, like one in a notebook.
    Raises UsageError.
    """
    if isinstance(reference, str):
        workload_class = user_code.find(reference, Workload)
    else:
        workload_class = reference
        user_code.check_members(workload_class, Workload)
        if "source" not in vars(workload_class):
            text = ""
            with contextlib.suppress(OSError, TypeError):  # the class was made by exec
                text = inspect.getsource(workload_class)
            workload_class.source = Source(f"{workload_class.__module__}:{workload_class.__qualname__}", "", text)
    _check_class(workload_class)
    return workload_class


def load_again(saved: str, given: Reference | None, file: str, folders: Iterable[Path]) -> type[Workload]:
    """Return the ``given`` workload; without one, the workload that a run has ``saved`` in ``file``.

    Raises UsageError. Saved code that may have come with a run is not loaded: see ``user_code.check_trusted``.
    """
    if given is not None:
        return load(given)
    user_code.check_trusted(saved, Workload, file, folders)
    try:
        return load(saved)
    except UsageError as error:
        raise UsageError(f"{error}; if the workload has moved, give its new location with --workload") from error


def _check_class(workload_class: type[Workload]) -> None:
    """Raise UsageError if a method is missing, or an attribute is not what it must be."""
    name, settings = workload_class.__name__, workload_class.Settings
    for method in ("load_data", "create_model", "loss"):
        if getattr(workload_class, method) is getattr(Workload, method):
            raise UsageError(f"workload {name} has no method {method}")
    with _checking(workload_class, "__init__"):
        inspect.signature(workload_class).bind(None, None)  # settings and metadata
    with _checking(workload_class, "metrics"):
        for metric in workload_class.metrics:
            if metric.mode not in ("max", "min"):
                raise UsageError(f"{metric.name} has the mode {metric.mode!r}; it must be max or min")
            if metric.name in ("score", "s"):
                raise UsageError(f"{metric.name} has another meaning in checkpoints; choose another name")
    if not dataclasses.is_dataclass(settings):
        raise UsageError(f"{name}.Settings must be a dataclass: put @dataclass(frozen=True) above it")
    with _checking(workload_class, "Settings"):
        _check_settings(settings)
    known: list[type] = [config.TrainConfig, settings]
    with _checking(workload_class, "recipes"):
        for recipe, values in workload_class.recipes.items():
            check_known(values, names_of([*known, config.WorkerConfig]), recipe)
            for config_class in (*known, config.WorkerConfig):
                build(config_class, {**workload_class.recipes.get("default", {}), **values})
    check_known(workload_class.search, names_of(known), f"{name}.search")


@contextlib.contextmanager
def _checking(workload_class: type[Workload], attribute: str) -> Iterator[None]:
    """Raise any error as a UsageError that names the attribute: a tuple of one may lack its comma, for example."""
    try:
        yield
    except Exception as error:
        said = error if isinstance(error, UsageError) else with_place(error, fallback=workload_class.source.folder)
        raise UsageError(f"{workload_class.__name__}.{attribute}: {said}") from error


def _check_settings(settings: type) -> None:
    """Raise an error if settings cannot become flags, or cannot be saved as JSON."""
    of_jobs = [value for value in vars(config).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]
    taken = names_of(of_jobs) | {"workload", "config", "recipe", "run", "help"}
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING:
            raise UsageError(f"{field.name} needs a default: use setting(DEFAULT, HELP)")
        if field.name in taken:
            raise UsageError(f"{flag(field.name)} is a flag already; give it another name")
    json.dumps(values_of(build(settings, {field.name: field.default for field in dataclasses.fields(settings)})))


def data_of(workload: Workload) -> Data:
    """Return a workload's data; set its metadata, unless a checkpoint set them. Raises UsageError and JobError."""
    with placed(workload, "load_data"):
        data = _checked_data(workload, workload.load_data())
    if not workload.metadata:
        with placed(workload, "metadata_of"):
            workload.metadata = json.loads(json.dumps(dict(workload.metadata_of(data)), allow_nan=False))  # as saved
    with placed(workload, "check_data"):
        workload.check_data(data)
    return data


@contextlib.contextmanager
def placed(workload: Workload, what: str) -> Iterator[None]:
    """Turn an exception in the user's code into a UsageError: one line, with file name and line number."""
    try:
        yield
    except (UsageError, JobError) as error:
        if not any(frame.filename == _API for frame in traceback.extract_tb(error.__traceback__)):
            raise
        said = f"{type(workload).__name__}, {what}: {with_place(error, workload.source.folder)}"  # of another run
        raise type(error)(said) from error
    except bdb.BdbQuit:  # ends a debugger
        raise
    except (Exception, SystemExit) as error:
        said = with_place(error, workload.source.folder)
        raise UsageError(f"{type(workload).__name__}, {what}: {said}") from sendable(error)


def picture_of(workload: Workload, inputs: Any) -> np.ndarray | None:
    """Return one input as a picture, or None if inputs cannot be shown. Raises UsageError for a wrong type."""
    with placed(workload, "as_picture"):
        image = workload.as_picture(inputs)
    is_array = isinstance(image, np.ndarray)
    if image is None or (is_array and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))):
        return image
    got = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
    raise UsageError(f"{type(workload).__name__}.as_picture must return uint8 (H, W) or (H, W, 3), not {got}")


def _checked_data(workload: Workload, data: object) -> Data:
    name = type(workload).__name__
    if not isinstance(data, Data):
        raise UsageError(f"{name}.load_data returned {type(data).__name__}, not mnist_ray.workload.Data")
    for split in ("train", "validation", "test"):
        examples, place = getattr(data, split), f"{name}.load_data: {split}"
        if examples is None and split == "validation":
            continue
        if isinstance(examples, Arrays):
            _check_arrays(place, examples)
        elif isinstance(examples, tuple) or not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
            kinds = "neither Arrays(inputs, targets) nor a Dataset with a length"
            raise UsageError(f"{place} is of type {type(examples).__name__}, {kinds}")
        if hasattr(examples, "collate_fn"):
            raise UsageError(f"{place} has a collate_fn, which nothing calls: make it {name}.collate(examples)")
        if len(examples) == 0:
            raise UsageError(f"{place} holds no examples")
    files = tuple(data.files)
    digest_of_files(files)  # raises OSError if one is missing
    return dataclasses.replace(data, name=data.name or name, files=files)


def _check_arrays(place: str, arrays: Arrays) -> None:
    for what, array in arrays.named.items():
        if not isinstance(array, np.ndarray) or array.ndim == 0:
            kind = "a single number" if isinstance(array, np.ndarray) else type(array).__name__
            raise UsageError(f"{place}: {what} must be a NumPy array (N, ...), not {kind}{_REMEDIES.get(kind, '')}")
        if isinstance(array, np.ma.MaskedArray):
            raise UsageError(f"{place}: {what} are a masked array, whose mask would be ignored; call .filled(VALUE)")
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{place}: {what} must be numbers, not of dtype {array.dtype}")
    (first, array), *others = arrays.named.items()
    for what, other in others:
        if len(other) != len(array):
            raise UsageError(f"{place} has {len(array):,} {first} but {len(other):,} {what}")


def digests_of(splits: Splits) -> dict[str, str | None]:
    """Return digests of the splits and of the data's ``files``: a resumed run recognizes its data by them.

    Arrays in memory are hashed by content, other data by their files. None for a ``Dataset`` without known files.
    """
    named = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    digests = {name: _digest_of(split) for name, split in named.items()}
    if not splits.files:
        return digests
    known = {name: digest for name, digest in digests.items() if digest is not None}
    return {**known, "files": digest_of_files(splits.files)}


def _digest_of(split: Split) -> str | None:
    try:
        if isinstance(split.examples, Blocks) and split.examples.identity is not None:
            return hashlib.sha256(split.examples.identity.encode()).hexdigest()
        if not isinstance(split.examples, Arrays):  # torchvision's folders: pairs (file, class)
            return digest_of_files([path for path, _ in split.examples.samples])
        digest = hashlib.sha256()
        for array in split.examples.named.values():
            if isinstance(owner := owner_of(array), np.memmap):
                digest.update(digest_of_files([str(owner.filename)]).encode())
                continue
            if span_of(array) < array.nbytes:  # rows overlap: a copy would be much larger than what they show
                digest.update(f"{array.shape} {array.strides}".encode())
                array = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
                array = as_strided(array, [span_of(array) // array.itemsize], [array.itemsize])
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
    except (AttributeError, TypeError, ValueError, OSError):
        return None


def digest_of_files(paths: Iterable[str | Path]) -> str:
    """Return a digest of the names, sizes and times of files. Raises OSError if a file is missing."""
    files = [os.fspath(path) for path in paths]
    folder = os.path.commonpath(map(os.path.dirname, files)) if files else ""
    digest = hashlib.sha256("\n".join(file[len(folder) :] for file in files).encode())
    for index in np.linspace(0, len(files) - 1, min(_MAX_FILES_ASKED, len(files)), dtype=int):
        stat = os.stat(files[index])
        digest.update(f"{stat.st_size} {int(stat.st_mtime)} ".encode())
    return digest.hexdigest()
