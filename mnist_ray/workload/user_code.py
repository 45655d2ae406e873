"""Finds and loads the classes that a user names with flags, and sends their code to other processes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mnist_ray.errors import UsageError, with_place
from mnist_ray.settings import path_of, split_call
from mnist_ray.storage import is_foreign, others_can_write


@dataclass(frozen=True)
class SourceCode:
    """The code of a class as it was when the job began. Other processes run this text, even if the file has changed."""

    reference: str  # an absolute path or a module's name, with `:NAME` once the class is loaded
    path: str
    text: str
    arguments: str = ""  # to create an object with, as in a call: `(num_epochs=2)`

    @property
    def call(self) -> str:
        """The reference with its arguments, as settings have it."""
        return self.reference + self.arguments

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return Path(self.path).parent

    @property
    def place(self) -> Path:
        """The file's folder; of a module or a class without a file, the current folder."""
        code, _ = _split(self.reference)
        return self.folder if code.endswith(".py") else Path.cwd()

    @property
    def sha256(self) -> str:
        """The digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class UserClass:
    """A class that a flag may name; the flag is named after the base class, like ``--workload``."""

    source: ClassVar[SourceCode]  # set by ``load``


T = TypeVar("T", bound=UserClass)
_BUILT_IN = {
    "tensorboard": "mnist_ray.trackers.tensorboard",
    "wandb": "mnist_ray.trackers.wandb",
    "mlflow": "mnist_ray.trackers.mlflow",
}
"""Modules of this package by the names that ``--tracker`` takes."""
_being_run = set[str]()  # files that are loaded now
alone = threading.RLock()
"""Held while a user's code is loaded or creates a model: it may not be thread-safe."""


def find(reference: str, base: type[T]) -> type[T]:
    """Return the class derived from ``base`` in ``FILE.py`` or ``package.module``; ``:NAME`` picks one of several.

    Raises UsageError if there is no such class, or if its code fails.
    """
    flag, (code, name) = _flag(base), _split(reference)
    if not reference.strip():
        raise UsageError(f"{flag} is empty", fix="name a FILE.py or a module")
    if code.endswith(".py"):
        path = str(path_of(code, flag).resolve())
        if other := _other_module(path):
            problem = f"{flag} {code}: Python has another module named {Path(code).stem}, {other}"
            raise UsageError(problem, fix="name that one, or rename one of the files")
        reference = path + (f":{name}" if name else "")
    else:
        path = inspect.getsourcefile(_pick(_import_module(code, flag), reference, base)) or ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # as Python reads it
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    found = load(SourceCode(reference, path, text), base)
    check_members(found, base)
    return found


def load(source: SourceCode, base: type[T]) -> type[T]:
    """Return the class from its source, in any process. Raises UsageError like ``find``."""
    code, _ = _split(source.reference)
    with alone:
        module = _module_of(dataclasses.replace(source, reference=code, arguments=""), _flag(base))
    loaded = _pick(module, source.reference, base)
    name = next(name for name, value in vars(module).items() if value is loaded)
    # With its name, since another class may be added to the file.
    loaded.source = dataclasses.replace(source, reference=f"{code}:{name}", arguments="")
    return loaded


def create(source: SourceCode, base: type[T], *given: Any) -> T:
    """Return an object of the class, created with the source's arguments after those ``given``."""
    _, arguments = split_call(f"f{source.arguments}")
    return load(source, base)(*given, **arguments)


def find_with_arguments(reference: str, base: type[UserClass]) -> SourceCode:
    """Return the source of the class and the arguments that ``reference`` names.

    Raises UsageError like ``find``, and if the class does not take these arguments after those of ``base``.
    """
    plain, arguments = split_call(reference)
    found = find(plain, base)
    try:
        inspect.signature(found).bind(*inspect.signature(base).parameters, **arguments)
    except TypeError as error:
        raise UsageError(f"{_flag(base)} {found.source.reference}: {error}") from error
    return dataclasses.replace(found.source, arguments=reference.removeprefix(plain))


def check_members(user_class: type, base: type) -> None:
    """Raise UsageError if a method's arguments differ from the base class's, or if a new name is misspelled.

    A new public name that resembles one of the base class's is probably misspelled.
    """
    for name, method in inspect.getmembers(base, inspect.isfunction):
        _check_arguments(user_class, name, method)
    known = [name for name in dir(base) if not name.startswith("_")]
    for name, value in vars(user_class).items():
        if name.startswith("_") or any(name in vars(parent) for parent in user_class.__mro__[1:]):
            continue
        meant = difflib.get_close_matches(name, known, 1, cutoff=0.6 if name.startswith("on_") else 0.8)
        if meant and callable(value) == callable(getattr(base, meant[0])):
            raise UsageError(f"{user_class.__name__}.{name}: did you mean {meant[0]}? If not, choose another name")


def _check_arguments(user_class: type, name: str, method: types.FunctionType) -> None:
    """Raise UsageError if a class's own method cannot be called like the base class's."""
    own, wanted = getattr(user_class, name), inspect.signature(method).parameters.values()
    if own is method or name.startswith("_") or not inspect.isfunction(own):
        return
    by_name = {argument.name: None for argument in wanted if argument.kind == argument.KEYWORD_ONLY}
    try:
        inspect.signature(own).bind(*[None] * (len(wanted) - len(by_name)), **by_name)
    except TypeError as error:
        place = f"{Path(own.__code__.co_filename).name}, line {own.__code__.co_firstlineno}"
        taken = ", ".join(argument.name for argument in wanted)
        raise UsageError(f"{user_class.__name__}.{name} must take ({taken}) ({place})") from error


def check_trusted(reference: str, flag: str, file: str, folders: Iterable[Path]) -> None:
    """Raise UsageError if the code that ``file`` names may have come with the file: see ``why_untrusted``."""
    path_of(_split(reference)[0], f"{file}: {flag}")
    if reason := why_untrusted(reference, folders):
        problem = f"{file} names {flag} {reference}, {reason}: the code may have come with the run"
        raise UsageError(problem, fix=f"if you trust it, name it with {flag}")


def why_untrusted(reference: str, folders: Iterable[Path]) -> str:
    """Return why code may be somebody else's: a relative path, in one of ``folders``, of another user, or a program.

    ``folders`` hold runs or their storage; other people may write there. Empty if nothing is wrong.
    """
    code, _ = _split(reference)
    if code.endswith(".py") and (not Path(code).is_absolute() or Path(code).parts[1] == "proc"):
        return "a relative path"
    if _is_program(code):
        return "a program of Python's"
    paths = [Path(code)] if code.endswith(".py") else _paths_of_module(code)
    untrusted = {folder.resolve() for folder in folders}
    if any(untrusted & set(path.resolve().parents) for path in paths):
        return "in a folder of runs"
    return "which belongs to another user" if any(map(is_foreign, paths)) else ""


def _is_program(code: str) -> bool:
    """Return whether the import of a module may run a program, with this command's arguments as its own."""
    package, *inner = code.split(".")
    has_main = any(name.startswith("__") for name in inner)  # such as IPython.__main__
    return not code.endswith(".py") and (has_main or package in sys.stdlib_module_names)


def _paths_of_module(name: str) -> list[Path]:
    """Return the paths of a module's package without importing it; none if it is missing, or is this package."""
    if _is_own(name):
        return []  # this package is loaded already
    _add_to_path(Path.cwd())
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return []
    paths = (found.origin, *(found.submodule_search_locations or ())) if found else ()
    return [Path(path) for path in paths if path]


def _flag(base: type) -> str:
    return f"--{base.__name__.lower()}"


def _split(reference: str) -> tuple[str, str]:
    """Split ``CODE:NAME``; a colon inside a path does not split it. A built-in name becomes its module."""
    code, colon, name = reference.rpartition(":")
    if not (colon and name.isidentifier()):
        code, name = reference, ""
    return _BUILT_IN.get(code, code), name


def _is_own(module: str) -> bool:
    """Return whether a module is part of this package."""
    return module.partition(".")[0] == __name__.partition(".")[0]


def _add_to_path(folder: Path) -> None:
    """Let Python find modules in a folder, unless others can write there: it imports optional modules by any name."""
    if str(folder) not in sys.path and not others_can_write(folder):
        sys.path.append(str(folder))


def _about_folder(error: BaseException, folder: Path) -> str:
    """Return why the module that Python misses is not imported from a folder that has it; else an empty string."""
    if not isinstance(error, ModuleNotFoundError) or str(folder) in sys.path:
        return ""
    module = (error.name or "").partition(".")[0]
    if not any((folder / name).exists() for name in (module, f"{module}.py")):
        return ""
    return f"; others can write to {folder}, so nothing is imported from it: if you trust it, set PYTHONPATH={folder}"


@functools.cache
def _module_of(source: SourceCode, flag: str) -> types.ModuleType:
    is_file = source.reference.endswith(".py")
    return _run_file(source, flag) if is_file else _import_module(source.reference, flag)


def _run_file(source: SourceCode, flag: str) -> types.ModuleType:
    """Run a file's text as a module. Like a script, it can import the files next to it."""
    if source.path in _being_run:
        raise UsageError("the file starts a job when it is loaded", fix='put the call under if __name__ == "__main__":')
    _add_to_path(source.folder)
    name = _module_name(source.path)
    module = types.ModuleType(name)
    module.__file__ = source.path
    sys.modules[name] = module  # dataclasses look up their module while it runs
    _being_run.add(source.path)
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = _about_folder(error, source.folder)
        raise UsageError(f"{flag} {source.path}: {with_place(error, source.folder)}{reason}") from error
    finally:
        _being_run.discard(source.path)
    return module


def _module_name(path: str) -> str:
    return re.sub(r"\W", "_", Path(path).stem)


def _other_module(path: str) -> str:
    """Return the file in which Python finds another module with this file's name; empty if there is none."""
    name = _module_name(path)
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None) or "which is built in"
    else:
        found = importlib.util.find_spec(name)
        origin = (found.origin if found else None) or path
    return "" if os.path.realpath(origin) == path else origin


def _import_module(name: str, flag: str) -> types.ModuleType:
    """Import a module, even from the current folder, like `python -m`."""
    if not _is_own(name):
        _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        reason = _about_folder(error, Path.cwd())
        is_missing = isinstance(error, ImportError) and f"{name}.".startswith(f"{error.name}.")
        if isinstance(error, ModuleNotFoundError) and name in _BUILT_IN.values():
            raise UsageError(f"{flag} {name.rpartition('.')[2]} needs a package: pip install {error.name}") from error
        if is_missing or name.startswith("."):  # a folder, or a file without .py
            said = "there is no such module; a file's name must end in .py"
        else:
            said = with_place(error, Path.cwd())
        raise UsageError(f"{flag} {name}: {said}{reason}") from error


def _pick(module: types.ModuleType, reference: str, base: type[T]) -> type[T]:
    """Return the module's class that ``:NAME`` names; without ``:NAME``, the only class that has no subclasses."""
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
        there = f", only {', '.join(found)}" if found else ""
        raise UsageError(f"{flag} {reference}: there is no {kind} {name}{there}")
    ancestors = {ancestor for value in found.values() for ancestor in value.__mro__[1:]}
    leaves = {value.__name__: value for value in found.values() if value not in ancestors}
    if not leaves:
        full_name = f"{base.__module__.removesuffix('.base')}.{base.__name__}"
        raise UsageError(f"{flag} {reference} holds no {kind}: no class derived from {full_name}")
    if len(leaves) > 1:
        raise UsageError(f"{flag} {reference} holds several {kind}s; add a name: :{', :'.join(leaves)}")
    return next(iter(leaves.values()))
