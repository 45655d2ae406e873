"""Settings by the place that gives them: recipes, a project's file, the environment, settings files, flags."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnist_ray.config import CLASSES, OutputConfig
from mnist_ray.errors import UsageError, first_line
from mnist_ray.settings import Given, Setting, build, check_known, declared, is_no_file, path_of
from mnist_ray.storage import is_foreign

FLAGS = "the flags"
STORAGE_VARIABLE = "MNIST_RAY_STORAGE_PATH"
ONLY_FLAGS = {"json"}  # neither in files nor in calls
_PROJECT_FILE, _TABLE = "pyproject.toml", "mnist_ray"


@dataclass(frozen=True)
class Place:
    """A place that gives settings."""

    name: str
    values: Given
    folder: Path | None = None  # where relative paths start: that of a file that people write; None: the current one


class Placed(NamedTuple):
    """A setting's value, and the place that decides it."""

    value: Any
    place: str
    rank: int  # of the place; the strongest has the largest


def merged(places: Sequence[Place], *classes: type) -> dict[str, Placed]:
    """Return the settings of some classes that places give, the strongest last.

    Raises UsageError for a wrong value, with its place.
    """
    found, known = dict[str, Placed](), declared(*classes)
    for rank, place in enumerate(places):
        for name in (name for name in known if name in place.values):
            try:
                found[name] = Placed(_value_in(place, known[name]), place.name, rank)
            except UsageError as error:
                raise UsageError(str(error) if place.name == FLAGS else f"{place.name}: {error}") from error
    return found


def check_names(places: Iterable[Place], of_workload: type) -> None:
    """Raise UsageError if a file has a setting that neither the workload nor any command has."""
    known = {*declared(*CLASSES, of_workload)} - {*ONLY_FLAGS, "config"}
    for place in places:
        check_known(place.values, known, place.name)


def defaults() -> tuple[list[Place], list[str]]:
    """Return the project and the environment as places, and notes for the user.

    The project's settings are in the table ``[tool.mnist_ray]`` of the nearest ``pyproject.toml`` that has one: in the
    current folder or above it. Raises UsageError.
    """
    places, notes = list[Place](), list[str]()
    for file in _project_files():
        if is_foreign(file):
            notes.append(f"{file} belongs to another user: its settings are ignored")
        elif (values := _table_of(file)) is not None:
            places.append(Place(str(file), values, file.parent))
            break
    if path := os.environ.get(STORAGE_VARIABLE):
        places.append(Place(STORAGE_VARIABLE, {"storage_path": path}))
    return places, notes


def read_files(given: object) -> list[Place]:
    """Return the settings files that ``--config`` names, if any, as places. Raises UsageError."""
    paths = declared(*CLASSES)["config"].checked(() if given is None else given)
    return [_read_file(path) for path in paths]


def storage_path(given: str | Path | None = None) -> str:
    """Return the storage of runs: as ``given``, else from the environment, the project or the default."""
    places = defaults()[0] if given is None else [Place(FLAGS, {"storage_path": given})]
    return build(OutputConfig, values_in(merged(places, OutputConfig))).storage_path


def values_in(settings: Mapping[str, Placed]) -> dict[str, Any]:
    """Return settings without their places."""
    return {name: value for name, (value, *_) in settings.items()}


def in_order(
    recipes: Mapping[str, Given], defaults: Sequence[Place], saved: Sequence[Place], after: Sequence[Place]
) -> list[Place]:
    """Return all places, the strongest last: ``after`` are the settings files and the flags.

    A resumed run has its ``saved`` settings instead of the recipes', unless a flag or a file names a recipe again.
    Raises UsageError if there is no such recipe.
    """
    naming = [place for place in [*([] if saved else defaults), *after] if "recipe" in place.values]
    name = naming[-1].values["recipe"] if naming else "default"
    if name not in (*recipes, "default"):
        where = "" if naming[-1].name == FLAGS else f"{naming[-1].name}: "
        raise UsageError(f"{where}there is no recipe {name}; known: {', '.join(recipes) or 'none'}")
    always = [] if saved else [Place("the default recipe", recipes.get("default", {}))]
    chosen = [] if name == "default" else [Place(f"the recipe {name}", recipes[name])]
    return [*defaults, *saved, *chosen, *after] if saved else [*always, *chosen, *defaults, *after]


def _value_in(place: Place, about: Setting) -> Any:
    """Return a setting's value in a place, whose relative paths start at its folder. Raises UsageError."""
    value = place.values[about.name]
    if place.folder and isinstance(value, str) and (about.plain is Path or about.name == "storage_path"):
        value = _from(place.folder, value)
    value = about.checked(value)
    if place.folder and about.code:
        return tuple(_from(place.folder, code) if re.search(r"\.py($|[:(])", code) else code for code in value)
    if place.folder and about.name == "workload" and value and re.search(r"\.py($|:)", value):
        return _from(place.folder, value)
    return value


def _from(folder: Path, path: str) -> str:
    return path if path[:1] in ("", "~") or "://" in path else str(folder / path)


def _project_files() -> Iterator[Path]:
    with contextlib.suppress(OSError):  # the current folder is gone
        here = Path.cwd()
        yield from (path for folder in (here, *here.parents) if os.path.isfile(path := folder / _PROJECT_FILE))


def _table_of(project_file: Path) -> dict[str, Any] | None:
    """Return the table of the settings in a project's file; None if there is none. Raises UsageError."""
    table: Any = _parsed(project_file, str(project_file)).get("tool")
    if not isinstance(table, dict) or _TABLE not in table:
        return None
    return _as_settings(table[_TABLE], f"[tool.{_TABLE}] of {project_file}")


def _read_file(path: str) -> Place:
    """Read a settings file: TOML, YAML or, as runs write it with whole paths, JSON. Raises UsageError."""
    file = path_of(path, "--config")
    return Place(path, _parsed(file, path), file.absolute().parent if file.suffix.lower() in _PARSERS else None)


def _parsed(file: Path, path: str) -> dict[str, Any]:
    """Return the content of a file, whose suffix tells its format. Raises UsageError."""
    kind, parse = _PARSERS.get(file.suffix.lower(), ("JSON", json.loads))
    try:
        if is_no_file(file):
            raise UsageError(f"the settings file {path} is not a file")
        return _as_settings(parse(file.read_text(encoding="utf-8-sig")), path)
    except OSError as error:
        raise UsageError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also if it is not UTF-8
        raise UsageError(f"{path} is not {kind}: {first_line(error)}") from error


def _as_settings(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} must contain settings by their names")
    return values


def _from_yaml(text: str) -> Any:
    from ruamel.yaml import YAML  # YAML 1.2, where 1e-3 is a number and `no` is a text
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', error)}{place}") from error


_PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {  # of people's files
    ".toml": ("TOML", tomllib.loads),
    ".yaml": ("YAML", _from_yaml),
    ".yml": ("YAML", _from_yaml),
}
