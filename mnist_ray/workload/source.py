"""Where a workload's code comes from: a file or a module that the user names, and how it gets to other processes."""

from __future__ import annotations

import copyreg
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from mnist_ray import config
from mnist_ray.errors import UsageError, with_place
from mnist_ray.settings import bound_names, build, check_known, flag, names_of, path_of, values_of
from mnist_ray.workload.interface import Source, Workload

DEFAULT = "mnist_ray.workload.mnist"
_INTERFACE = [name for name in dir(Workload) if not name.startswith("_")]


def load(reference: str) -> type[Workload]:
    """Return the workload that ``FILE.py`` or ``package.module`` holds, by ``:NAME`` where it holds several.

    Raises UsageError where there is none, or its code fails.
    """
    if not reference.strip():
        raise UsageError("--workload is empty; name a FILE.py or a module")
    place, name = _split(reference)
    if not place.endswith(".py"):
        module = _import_module(place)
        path = inspect.getsourcefile(_pick(module, name, reference)) or ""
        return _load(Source(reference, path, Path(path).read_text(encoding="utf-8")))
    path = str(path_of(place, "--workload").resolve())
    if _is_another(_module_name(path), path):
        raise UsageError(
            f"--workload {place}: Python has another module {Path(place).stem}; give the file another name"
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--workload {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    return _load(Source(path + (f":{name}" if name else ""), path, text))


def load_again(saved: str, given: str | None) -> type[Workload]:
    """Return the workload that is ``given``, else the one that was ``saved`` with a run. Raises UsageError."""
    if given is not None:
        return load(given)
    try:
        return load(saved)
    except UsageError as error:
        raise UsageError(f"{error}; if the workload is elsewhere now, say where with --workload") from error


def create(source: Source, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Workload:
    """Return a workload as another process had it."""
    workload_class = _load(source)
    return workload_class(build(workload_class.Settings, settings), facts)


def is_shipped(workload_class: type[Workload]) -> bool:
    """Tell whether a workload is part of this package, and so was tried when it was built."""
    return workload_class.__module__.startswith("mnist_ray.")


@functools.cache
def _load(source: Source) -> type[Workload]:
    place, name = _split(source.reference)
    module = _run_file(source) if source.is_file else _import_module(place)
    workload_class = _pick(module, name, source.reference)
    workload_class.source = source
    _check(workload_class)
    copyreg.pickle(workload_class, _as_source)  # type: ignore[arg-type]
    return workload_class


def _as_source(workload: Workload) -> tuple[Any, ...]:
    """Let a workload travel to other processes as source and values: they need not be able to import the class."""
    return create, (workload.source, values_of(workload.settings), workload.facts)


def _split(reference: str) -> tuple[str, str]:
    """Split ``PLACE:NAME``; a colon that belongs to a path stays in it."""
    place, colon, name = reference.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (reference, "")


def _run_file(source: Source) -> types.ModuleType:
    """Make a module of a file's text; what lies beside it can be imported, as from a script."""
    name, is_new_folder = _module_name(source.path), str(source.folder) not in sys.path
    if is_new_folder:
        sys.path.append(str(source.folder))
    module = types.ModuleType(name)
    module.__file__ = source.path
    sys.modules[name] = module  # dataclasses look their own module up while it runs
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if is_new_folder:
            sys.path.remove(str(source.folder))
        raise UsageError(f"--workload {source.path}: {with_place(error, source.folder)}") from error
    return module


def _module_name(path: str) -> str:
    return re.sub(r"\W", "_", Path(path).stem)


def _is_another(name: str, path: str) -> bool:
    """Tell whether Python knows a module of that name that is not the file."""
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None)
        return origin is None or os.path.realpath(origin) != path
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None and os.path.realpath(found.origin) != path


def _import_module(name: str) -> types.ModuleType:
    if str(Path.cwd()) not in sys.path:  # as `python -m` has it
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"--workload {name}: there is no such module; a file ends in .py") from error
        raise UsageError(f"--workload {name}: {with_place(error, Path.cwd())}") from error
    except Exception as error:
        raise UsageError(f"--workload {name}: {with_place(error, Path.cwd())}") from error


def _pick(module: types.ModuleType, name: str, reference: str) -> type[Workload]:
    """Return the workload of a module: the one of that name, or the only one that no other is derived from."""
    own = (module.__name__, module.__name__ + ".")
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Workload)
        and (value.__module__ == own[0] or value.__module__.startswith(own[1]))
    }
    if name:
        if name not in found:
            there = f"; there {'are' if len(found) > 1 else 'is'} {', '.join(found)}" if found else ""
            raise UsageError(f"--workload {reference}: it has no workload {name}{there}")
        return found[name]
    by_class = {value: key for key, value in found.items()}
    leaves = [value.__name__ for value in by_class if not any(value in other.__mro__[1:] for other in by_class)]
    if len(leaves) == 1:
        return next(value for value in by_class if value.__name__ == leaves[0])
    if leaves:
        raise UsageError(f"--workload {reference} holds several workloads; add one's name: :{', :'.join(leaves)}")
    raise UsageError(f"--workload {reference} holds no workload: a class derived from mnist_ray.workload.Workload")


def _check(workload_class: type[Workload]) -> None:
    """Raise UsageError where a workload lacks what every one must say, or its settings cannot be flags."""
    name = workload_class.__name__
    for method in ("load_data", "create_model", "loss"):
        if getattr(workload_class, method) is getattr(Workload, method):
            close = difflib.get_close_matches(method, vars(workload_class), 1, cutoff=0.8)
            there = f"; it has {close[0]}" if close else ""
            raise UsageError(f"workload {name} has no method {method}{there}")
    for attribute in vars(workload_class):
        meant = difflib.get_close_matches(attribute, _INTERFACE, 1, cutoff=0.8)
        if not attribute.startswith("_") and not hasattr(workload_class.__mro__[1], attribute) and meant:
            raise UsageError(
                f"{name}.{attribute} is nothing that a workload has: it has {meant[0]}; give it another name"
            )
    settings = workload_class.Settings
    if not dataclasses.is_dataclass(settings):
        raise UsageError(f"{name}.Settings is to be a dataclass: put @dataclass(frozen=True) above it")
    try:
        get_type_hints(settings)
    except NameError as error:
        raise UsageError(f"{name}.Settings: {error}; import it outside of TYPE_CHECKING") from error
    taken = _taken()
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING:
            raise UsageError(f"{name}.Settings: {field.name} needs a default, as setting(DEFAULT, HELP) gives one")
        space = workload_class.search.get(field.name, field.metadata.get("search"))
        for flag_name in (field.name, *(bound_names(field.name, space) if space else ())):
            if flag_name in taken:
                raise UsageError(
                    f"{name}.Settings: {flag(flag_name)} is a flag already; give {field.name} another name"
                )
            taken.add(flag_name)
    known = names_of([config.TrainConfig, settings])
    for recipe, values in workload_class.recipes.items():
        check_known(values, known | names_of([config.WorkerConfig]), f"{name}.recipes: {recipe}")
    check_known(workload_class.search, known, f"{name}.search")


def _taken() -> set[str]:
    """Return the flags that the jobs have themselves."""
    classes = [value for value in vars(config).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]
    searched = [field for field in dataclasses.fields(config.TrainConfig) if field.metadata["search"]]
    bounds = {bound for field in searched for bound in bound_names(field.name, field.metadata["search"])}
    return names_of(classes) | bounds | {"workload", "config", "recipe", "run", "help"}
