"""Loads and checks a workload's class. Starts fast, without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mnist_ray import config
from mnist_ray.errors import UsageError, with_place
from mnist_ray.settings import build, check_known, declared, flag, values_of
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import LOSS
from mnist_ray.workload.user_code import SourceCode

DEFAULT = "mnist_ray.mnist"

Reference = str | type[Workload]  # a value of ``--workload``, or a class in this process


def load(reference: Reference) -> type[Workload]:
    """Return the workload in ``FILE.py`` or ``package.module``; ``:NAME`` picks one of several.

    A class is returned as it is. Other processes cannot load a class without a file, such as one in a notebook.
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
            workload_class.source = SourceCode(f"{workload_class.__module__}:{workload_class.__qualname__}", "", text)
    _check_class(workload_class)
    return workload_class


def load_again(saved: str, given: Reference | None, file: str, folders: Iterable[Path]) -> type[Workload]:
    """Return the ``given`` workload; without one, the workload that a run has ``saved`` in ``file``.

    Raises UsageError. Saved code that may have come with a run is not loaded: see ``user_code.check_trusted``.
    """
    if given is not None:
        return load(given)
    user_code.check_trusted(saved, "--workload", file, folders)
    try:
        return load(saved)
    except UsageError as error:
        found = f"{error} (of {file})" if file else str(error)
        raise UsageError(found, fix="if the workload has moved, give its new location with --workload") from error


def _check_class(workload_class: type[Workload]) -> None:
    """Raise UsageError if a method is missing, or an attribute is invalid."""
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
            if metric.name == LOSS.name and metric != LOSS:
                raise UsageError('the loss is named as Metric("loss", "min")')
    if not dataclasses.is_dataclass(settings):
        raise UsageError(f"{name}.Settings must be a dataclass", fix="put @dataclass(frozen=True) above it")
    with _checking(workload_class, "Settings"):
        _check_settings(settings)
    known: list[type] = [config.TrainConfig, settings]
    with _checking(workload_class, "recipes"):
        for recipe, values in workload_class.recipes.items():
            check_known(values, declared(*known, config.WorkerConfig), recipe)
            for config_class in (*known, config.WorkerConfig):
                build(config_class, {**workload_class.recipes.get("default", {}), **values})
    check_known(workload_class.search, declared(*known), f"{name}.search")


@contextlib.contextmanager
def _checking(workload_class: type[Workload], attribute: str) -> Iterator[None]:
    """Raise any error as a UsageError that names the attribute: a one-element tuple may lack its comma, for example."""
    try:
        yield
    except Exception as error:
        said = error if isinstance(error, UsageError) else with_place(error, fallback=workload_class.source.folder)
        raise UsageError(f"{workload_class.__name__}.{attribute}: {said}") from error


def _check_settings(settings: type) -> None:
    """Raise an error if settings cannot become flags, or cannot be saved as JSON."""
    taken = {*declared(*config.CLASSES, config.EvaluationConfig), "run", "set", "help"}
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING:
            raise UsageError(f"{field.name} needs a default", fix="use setting(DEFAULT, HELP)")
        if field.name in taken:
            raise UsageError(f"{flag(field.name)} is already a flag", fix="give it another name")
    json.dumps(values_of(build(settings, {field.name: field.default for field in dataclasses.fields(settings)})))


def reference_of(workload: type[Workload] | str | Path, *, is_here: bool = False) -> Reference:
    """Return a reference by which other processes can load a workload's class: its file or module, and its name.

    Raises UsageError for anything else, and for a class that only this process has. If ``is_here``, no
    other process needs the class, and the class itself is returned.
    """
    if isinstance(workload, (str, Path)):
        return str(workload)
    if not (isinstance(workload, type) and issubclass(workload, Workload)):
        raise UsageError(f"--workload must be a class derived from Workload, a file or a module, not {workload!r}")
    if "source" in vars(workload):
        return workload.source.reference if workload.source.path else workload
    module, name = sys.modules[workload.__module__], workload.__module__
    file = getattr(module, "__file__", None)
    # From a notebook's cell, from code piped into Python, or from a function.
    if file is None or not Path(file).is_file() or "<locals>" in workload.__qualname__:
        if is_here:
            return workload
        raise UsageError(
            f"{workload.__name__} is in a notebook's cell or a function, where other processes cannot find it: write "
            f"it to a file (%%writefile {workload.__name__.lower()}.py) and give the file's name, or use num_workers=0"
        )
    if name == "__main__" and (spec := getattr(module, "__spec__", None)) is not None:  # of python -m
        name = spec.name
    if "." in name:
        return f"{name}:{workload.__qualname__}"
    return f"{Path(inspect.getfile(workload)).resolve()}:{workload.__qualname__}"
