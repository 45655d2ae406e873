"""Settings by the place that gives them: recipes, a project's file, the environment, settings files, flags."""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnist_ray.config import CLASSES, OutputConfig
from mnist_ray.errors import UsageError, first_line
from mnist_ray.settings import Given, build, check_known, declared, path_of
from mnist_ray.storage import is_foreign

FLAGS = "the flags"
STORAGE_VARIABLE = "MNIST_RAY_STORAGE_PATH"
ONLY_FLAGS = {"json"}  # neither in files nor in calls
_TABLE = "mnist_ray"


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
    found = dict[str, Placed]()
    for rank, place in enumerate(places):
        for name, about in declared(*classes).items():
            if name in place.values:
                try:
                    found[name] = Placed(about.checked(place.values[name], place.folder), place.name, rank)
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
    with contextlib.suppress(FileNotFoundError):  # the current folder is gone
        for file in (folder / "pyproject.toml" for folder in (Path.cwd(), *Path.cwd().parents)):
            if not os.path.isfile(file):
                continue
            if is_foreign(file):
                notes.append(f"{file} belongs to another user: its settings are ignored")
                continue
            tools = _read(file, str(file)).get("tool")
            if isinstance(tools, dict) and _TABLE in tools:
                table = _as_settings(tools[_TABLE], f"[tool.{_TABLE}] of {file}")
                places.append(Place(str(file), table, file.parent))
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
    chosen = [] if name == "default" else [Place(f"the recipe {name}", recipes[name])]
    if saved:
        return [*defaults, *saved, *chosen, *after]
    return [Place("the default recipe", recipes.get("default", {})), *chosen, *defaults, *after]


def _read_file(path: str) -> Place:
    """Read a settings file: TOML, YAML or, as runs write it with whole paths, JSON. Raises UsageError."""
    file = path_of(path, "--config")
    is_of_run = _format_of(file) == "JSON"
    return Place(path, _read(file, path), None if is_of_run else file.absolute().parent)


def _read(file: Path, named: str) -> dict[str, Any]:
    """Return the content of a file, whose suffix tells its format. Raises UsageError; messages call it ``named``."""
    parse: dict[str, Callable[[str], Any]] = {"TOML": tomllib.loads, "YAML": _from_yaml, "JSON": json.loads}
    try:
        return _as_settings(parse[_format_of(file)](file.read_text(encoding="utf-8-sig")), named)
    except OSError as error:
        raise UsageError(f"cannot read the settings file {named}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also if it is not UTF-8
        raise UsageError(f"{named} is not {_format_of(file)}: {first_line(error)}") from error


def _format_of(file: Path) -> str:
    return {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}.get(file.suffix.lower(), "JSON")


def _as_settings(values: Any, named: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{named} must contain settings by their names")
    return values


def _from_yaml(text: str) -> Any:
    from ruamel.yaml import YAML  # YAML 1.2, where 1e-3 is a number and `no` is a text
    from ruamel.yaml.error import MarkedYAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{place}") from error
