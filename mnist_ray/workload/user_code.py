"""Classes of the user's, from a file or a module that a flag names, and how their code gets to other processes."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from mnist_ray.errors import UsageError, with_place
from mnist_ray.settings import path_of


@dataclass(frozen=True)
class Source:
    """The code of a class as it was when the job began; other processes run just that."""

    reference: str  # what the flag takes: an absolute path or a module's name, with `:NAME` if it was given
    path: str  # the file
    text: str  # the file's content

    @property
    def folder(self) -> Path:
        """The folder that the file lies in."""
        return Path(self.path).parent

    @property
    def sha256(self) -> str:
        """The digest of the file's content."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class UserClass:
    """A class that a flag may name."""

    source: ClassVar[Source]  # its code; set as it is loaded


T = TypeVar("T", bound=UserClass)


def find(reference: str, base: type[T]) -> type[T]:
    """Return the class derived from ``base`` that ``FILE.py`` or ``package.module`` holds, by ``:NAME`` of several.

    Its flag is the name of ``base``. Raises UsageError if there is no such class, or its code fails.
    """
    flag = _flag(base)
    if not reference.strip():
        raise UsageError(f"{flag} is empty; name a FILE.py or a module")
    place, name = _split(reference)
    if not place.endswith(".py"):
        path = inspect.getsourcefile(_pick(_import_module(place, flag), reference, base)) or ""
        return load(Source(reference, path, Path(path).read_text(encoding="utf-8")), base)
    path = str(path_of(place, flag).resolve())
    if _is_another_module(path):
        raise UsageError(f"{flag} {place}: Python has another module {Path(place).stem}; give the file another name")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    return load(Source(path + (f":{name}" if name else ""), path, text), base)


def load(source: Source, base: type[T]) -> type[T]:
    """Return the class of some code, also in a process that has not found it. Raises UsageError as ``find``."""
    loaded = _pick(_module_of(source, _flag(base)), source.reference, base)
    loaded.source = source
    return loaded


def check_trusted(reference: str, base: type, file: str, folders: Iterable[Path]) -> None:
    """Raise UsageError if a reference, which ``file`` holds, may lead to code that came with that file."""
    if reason := why_untrusted(reference, folders):
        raise UsageError(
            f"{file} names {_flag(base)} {reference}, {reason}: code that may have come with a run is loaded only "
            f"where {_flag(base)} says so on the command line"
        )


def why_untrusted(reference: str, folders: Iterable[Path]) -> str:
    """Say why code may have come with a run: it is at a relative path, or in one of ``folders``. Empty if neither.

    ``folders`` are the run's and the storage of runs, where others may write.
    """
    place, _ = _split(reference)
    if place.endswith(".py") and not Path(place).is_absolute():
        return "a relative path"
    paths = [Path(place)] if place.endswith(".py") else _paths_of_module(place)
    untrusted = {folder.resolve() for folder in folders}
    return "in a folder of runs" if any(untrusted & set(path.resolve().parents) for path in paths) else ""


def _paths_of_module(name: str) -> list[Path]:
    """Return where Python would import a module's package from; none if there is none, or it is this one."""
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return []  # it runs already, wherever it lies
    _add_to_path(Path.cwd())
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        return []
    return [Path(place) for place in (found.origin, *(found.submodule_search_locations or ())) if place]


def _flag(base: type) -> str:
    return f"--{base.__name__.lower()}"


def _split(reference: str) -> tuple[str, str]:
    """Split ``PLACE:NAME``; a colon that belongs to a path stays in it."""
    place, colon, name = reference.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (reference, "")


def _add_to_path(folder: Path) -> None:
    """Let modules be imported from a folder."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@functools.cache
def _module_of(source: Source, flag: str) -> types.ModuleType:
    place, _ = _split(source.reference)
    return _run_file(source, flag) if place.endswith(".py") else _import_module(place, flag)


def _run_file(source: Source, flag: str) -> types.ModuleType:
    """Make a module of a file's text; what lies beside it can be imported, as from a script."""
    _add_to_path(source.folder)
    name = _module_name(source.path)
    module = types.ModuleType(name)
    module.__file__ = source.path
    sys.modules[name] = module  # dataclasses look their own module up while it runs
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{flag} {source.path}: {with_place(error, source.folder)}") from error
    return module


def _module_name(path: str) -> str:
    return re.sub(r"\W", "_", Path(path).stem)


def _is_another_module(path: str) -> bool:
    """Return whether Python knows a module of a file's name that is another file."""
    name = _module_name(path)
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None) or "built in"
    else:
        found = importlib.util.find_spec(name)
        origin = (found.origin if found else None) or path
    return os.path.realpath(origin) != path


def _import_module(name: str, flag: str) -> types.ModuleType:
    """Import a module, as `python -m` does also from the current folder."""
    _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ImportError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{flag} {name}: there is no such module; a file ends in .py") from error
        raise UsageError(f"{flag} {name}: {with_place(error, Path.cwd())}") from error


def _pick(module: types.ModuleType, reference: str, base: type[T]) -> type[T]:
    """Return the class of a module: the one of the reference's name, or the only one that no other is derived from."""
    (_, name), kind, own = _split(reference), base.__name__.lower(), f"{module.__name__}."
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}
    found = {key: value for key, value in classes.items() if f"{value.__module__}.".startswith(own)}
    if name in found:
        return found[name]
    if name:
        there = f"; it has {', '.join(found)}" if found else ""
        raise UsageError(f"{_flag(base)} {reference}: it has no {kind} {name}{there}")
    ancestors = {ancestor for value in found.values() for ancestor in value.__mro__[1:]}
    leaves = {value.__name__: value for value in found.values() if value not in ancestors}
    if not leaves:
        where = f"{base.__module__.removesuffix('.base')}.{base.__name__}"
        raise UsageError(f"{_flag(base)} {reference} holds no {kind}: a class derived from {where}")
    if len(leaves) > 1:
        raise UsageError(f"{_flag(base)} {reference} holds several {kind}s; add one's name: :{', :'.join(leaves)}")
    return next(iter(leaves.values()))
