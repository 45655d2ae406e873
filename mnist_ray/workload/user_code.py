"""Classes of the user's: from a file or a module that a flag names, and how their code gets to other processes."""

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

from mnist_ray.errors import UsageError, with_place
from mnist_ray.settings import path_of


@dataclass(frozen=True)
class Source:
    """The code of a class as it was when the job began; other processes run just that."""

    reference: str  # what the flag takes: an absolute path or a module's name, with `:NAME` where it was given
    path: str  # the file
    text: str  # the file's content

    @property
    def is_file(self) -> bool:
        """Whether it is loaded as a file: it travels with the job, and need not be importable anywhere."""
        return self.reference.endswith(".py") or ".py:" in self.reference

    @property
    def folder(self) -> Path:
        """The folder that the file lies in."""
        return Path(self.path).parent

    @property
    def sha256(self) -> str:
        """The digest of the file's content."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def folders_of(*sources: Source | None) -> list[Path]:
    """Return where some code is, of those that are there."""
    return [source.folder for source in sources if source is not None]


def find(reference: str, base: type) -> tuple[type, Source]:
    """Return the class derived from ``base`` that ``FILE.py`` or ``package.module`` holds, by ``:NAME`` of several.

    Its flag is the name of ``base``. Raises UsageError where there is none, or its code fails.
    """
    flag = _flag(base)
    if not reference.strip():
        raise UsageError(f"{flag} is empty; name a FILE.py or a module")
    place, name = _split(reference)
    if not place.endswith(".py"):
        found = _pick(_import_module(place, flag), name, reference, base)
        path = inspect.getsourcefile(found) or ""
        return found, Source(reference, path, Path(path).read_text(encoding="utf-8"))
    path = str(path_of(place, flag).resolve())
    if _is_another(_module_name(path), path):
        raise UsageError(f"{flag} {place}: Python has another module {Path(place).stem}; give the file another name")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    source = Source(path + (f":{name}" if name else ""), path, text)
    return load(source, base), source


def check_trusted(reference: str, base: type, file: str, folders: Iterable[Path]) -> None:
    """Raise UsageError if a reference, which ``file`` holds, may lead to code that came with that file."""
    if reason := why_untrusted(reference, folders):
        raise UsageError(
            f"{file} names {_flag(base)} {reference}, {reason}: code that may have come with a run is loaded only "
            f"where {_flag(base)} says so on the command line"
        )


def why_untrusted(reference: str, folders: Iterable[Path]) -> str:
    """Say why code may have come with a run: it is at a relative path, or in one of ``folders``. Empty where neither.

    These are the run's, and the storage of runs, where others may write.
    """
    place, _ = _split(reference)
    if place.endswith(".py") and not Path(place).is_absolute():
        return "a relative path"
    paths = [Path(place)] if place.endswith(".py") else _paths_of_module(place)
    resolved = {folder.resolve() for folder in folders}
    is_inside = any(not resolved.isdisjoint(path.resolve().parents) for path in paths)
    return "in a folder of runs" if is_inside else ""


def _paths_of_module(name: str) -> list[Path]:
    """Return where Python would import a module's package from; nowhere where there is none."""
    _add_current_folder()
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    return (
        [Path(place) for place in (found.origin, *(found.submodule_search_locations or ())) if place] if found else []
    )


@functools.cache
def load(source: Source, base: type) -> type:
    """Return a class as another process had it. Raises as ``find``."""
    place, name = _split(source.reference)
    module = _run_file(source, _flag(base)) if source.is_file else _import_module(place, _flag(base))
    return _pick(module, name, source.reference, base)


def _flag(base: type) -> str:
    return f"--{base.__name__.lower()}"


def _split(reference: str) -> tuple[str, str]:
    """Split ``PLACE:NAME``; a colon that belongs to a path stays in it."""
    place, colon, name = reference.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (reference, "")


def _run_file(source: Source, flag: str) -> types.ModuleType:
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
        raise UsageError(f"{flag} {source.path}: {with_place(error, source.folder)}") from error
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


def _add_current_folder() -> None:
    """Let modules be found in the current folder, as `python -m` has it."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _import_module(name: str, flag: str) -> types.ModuleType:
    _add_current_folder()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{flag} {name}: there is no such module; a file ends in .py") from error
        raise UsageError(f"{flag} {name}: {with_place(error, Path.cwd())}") from error
    except Exception as error:
        raise UsageError(f"{flag} {name}: {with_place(error, Path.cwd())}") from error


def _pick(module: types.ModuleType, name: str, reference: str, base: type) -> type:
    """Return the class of a module: the one of that name, or the only one that no other is derived from."""
    own, kind, flag = (module.__name__, module.__name__ + "."), base.__name__.lower(), _flag(base)
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and (value.__module__ == own[0] or value.__module__.startswith(own[1]))
    }
    if name:
        if name not in found:
            there = f"; there {'are' if len(found) > 1 else 'is'} {', '.join(found)}" if found else ""
            raise UsageError(f"{flag} {reference}: it has no {kind} {name}{there}")
        return found[name]
    by_class = {value: key for key, value in found.items()}
    leaves = [value.__name__ for value in by_class if not any(value in other.__mro__[1:] for other in by_class)]
    if len(leaves) == 1:
        return next(value for value in by_class if value.__name__ == leaves[0])
    if leaves:
        raise UsageError(f"{flag} {reference} holds several {kind}s; add one's name: :{', :'.join(leaves)}")
    where = f"{base.__module__.removesuffix('.base')}.{base.__name__}"
    raise UsageError(f"{flag} {reference} holds no {kind}: a class derived from {where}")
