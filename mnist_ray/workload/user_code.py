"""Finds and loads the user's classes, which flags name, and sends their code to other processes."""

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
    """The code of a class when the job began. Other processes run this text, even if the file has changed."""

    reference: str  # like the flag: an absolute path or a module's name, with `:NAME` if it was given
    path: str
    text: str

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return Path(self.path).parent

    @property
    def sha256(self) -> str:
        """The digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class UserClass:
    """A class that a flag may name: the flag is the name of the base class."""

    source: ClassVar[Source]  # set by ``load``


T = TypeVar("T", bound=UserClass)


def find(reference: str, base: type[T]) -> type[T]:
    """Return the class derived from ``base`` in ``FILE.py`` or ``package.module``; with ``:NAME`` if there are several.

    Raises UsageError if there is none, or its code fails.
    """
    flag, (place, name) = _flag(base), _split(reference)
    if not reference.strip():
        raise UsageError(f"{flag} is empty; name a FILE.py or a module")
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
    """Return the class from its source, in any process. Raises UsageError like ``find``."""
    loaded = _pick(_module_of(source, _flag(base)), source.reference, base)
    loaded.source = source
    return loaded


def check_trusted(reference: str, base: type, file: str, folders: Iterable[Path]) -> None:
    """Raise UsageError if ``file`` may refer to code that came with it: see ``why_untrusted``."""
    if reason := why_untrusted(reference, folders):
        raise UsageError(
            f"{file} names {_flag(base)} {reference}, {reason}: code that may have come with a run is loaded only "
            f"if the command line has {_flag(base)}"
        )


def why_untrusted(reference: str, folders: Iterable[Path]) -> str:
    """Say why code may have come with a run: a relative path, or a place in one of ``folders``. Empty if neither.

    ``folders`` are those of runs and of their storage, where others may write.
    """
    place, _ = _split(reference)
    if place.endswith(".py") and not Path(place).is_absolute():
        return "a relative path"
    paths = [Path(place)] if place.endswith(".py") else _paths_of_module(place)
    untrusted = {folder.resolve() for folder in folders}
    return "in a folder of runs" if any(untrusted & set(path.resolve().parents) for path in paths) else ""


def _paths_of_module(name: str) -> list[Path]:
    """Return the paths of a module's package, without importing it; none if it is missing, or this package."""
    package = name.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return []  # it runs already
    _add_to_path(Path.cwd())
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    places = (found.origin, *(found.submodule_search_locations or ())) if found else ()
    return [Path(place) for place in places if place]


def _flag(base: type) -> str:
    return f"--{base.__name__.lower()}"


def _split(reference: str) -> tuple[str, str]:
    """Split ``PLACE:NAME``; a colon within a path stays there."""
    place, colon, name = reference.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (reference, "")


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@functools.cache
def _module_of(source: Source, flag: str) -> types.ModuleType:
    place, _ = _split(source.reference)
    return _run_file(source, flag) if place.endswith(".py") else _import_module(place, flag)


def _run_file(source: Source, flag: str) -> types.ModuleType:
    """Run a file's text as a module, which can import the files next to it, like a script."""
    _add_to_path(source.folder)
    name = _module_name(source.path)
    module = types.ModuleType(name)
    module.__file__ = source.path
    sys.modules[name] = module  # dataclasses look up their module while it runs
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{flag} {source.path}: {with_place(error, source.folder)}") from error
    return module


def _module_name(path: str) -> str:
    return re.sub(r"\W", "_", Path(path).stem)


def _is_another_module(path: str) -> bool:
    """Tell whether Python has a module of this name in another file."""
    name = _module_name(path)
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None) or "built in"
    else:
        found = importlib.util.find_spec(name)
        origin = (found.origin if found else None) or path
    return os.path.realpath(origin) != path


def _import_module(name: str, flag: str) -> types.ModuleType:
    """Import a module, also from the current folder, like `python -m`."""
    _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ImportError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{flag} {name}: there is no such module; a file ends in .py") from error
        raise UsageError(f"{flag} {name}: {with_place(error, Path.cwd())}") from error


def _pick(module: types.ModuleType, reference: str, base: type[T]) -> type[T]:
    """Return a module's class by the reference's ``:NAME``, else its only class without subclasses."""
    (_, name), kind, flag = _split(reference), base.__name__.lower(), _flag(base)
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base)
        if f"{value.__module__}.".startswith(f"{module.__name__}.")
    }
    if name in found:
        return found[name]
    if name:
        there = f"; it has {', '.join(found)}" if found else ""
        raise UsageError(f"{flag} {reference}: it has no {kind} {name}{there}")
    ancestors = {ancestor for value in found.values() for ancestor in value.__mro__[1:]}
    leaves = {value.__name__: value for value in found.values() if value not in ancestors}
    if not leaves:
        full_name = f"{base.__module__.removesuffix('.base')}.{base.__name__}"
        raise UsageError(f"{flag} {reference} holds no {kind}: a class derived from {full_name}")
    if len(leaves) > 1:
        raise UsageError(f"{flag} {reference} holds several {kind}s; add one's name: :{', :'.join(leaves)}")
    return next(iter(leaves.values()))
