"""Settings by the place that gives them: recipes, a project's file, the environment, a settings file, flags."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_ray.config import CLASSES, OutputConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import Given, build, check_known, checked, declared
from mnist_ray.settings_files import located, read_table
from mnist_ray.storage import is_foreign

FLAGS = "the flags"
STORAGE_VARIABLE = "MNIST_RAY_STORAGE_PATH"
ONLY_FLAGS = {"json"}  # neither in files nor in calls
_PROJECT_FILE, _TABLE = "pyproject.toml", "mnist_ray"


@dataclass(frozen=True)
class Layers:
    """Settings by the place that gives them. Later places win."""

    places: Mapping[str, Given]

    @property
    def values(self) -> dict[str, Any]:
        """The settings of all places."""
        return {name: value for given in self.places.values() for name, value in given.items()}

    def place_of(self, name: str) -> str:
        """Return the place that decides a setting; empty if none gives it."""
        return next((place for place, given in reversed([*self.places.items()]) if name in given), "")

    def decided(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each place that decides settings of the run, with these settings."""
        once = {name for name, about in declared(*CLASSES).items() if about.on_resume == "dropped"}
        for place, given in self.places.items():
            own = {name: value for name, value in given.items() if name not in once and self.place_of(name) == place}
            if own:
                yield place, own


def defaults() -> tuple[dict[str, Given], list[str]]:
    """Return the settings of the project and of the environment by their place, and notes for the user.

    The project's are in the table ``[tool.mnist_ray]`` of the nearest ``pyproject.toml`` that has one: in the current
    folder or above it. Raises UsageError.
    """
    places, notes = dict[str, Given](), list[str]()
    for file in _project_files():
        if is_foreign(file):
            notes.append(f"{file} belongs to another user: its settings are ignored")
        elif (values := read_table(file, "tool", _TABLE)) is not None:
            places[str(file)] = located(values, file, *CLASSES)
            break
    if path := os.environ.get(STORAGE_VARIABLE):
        places[STORAGE_VARIABLE] = {"storage_path": path}
    return places, notes


def check_files(places: Mapping[str, Given], classes: Sequence[type]) -> None:
    """Raise UsageError, with the file's name, if a value of a setting of ``classes`` is wrong."""
    for place, values in places.items():
        try:
            checked(values, *classes)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error


def with_workload(places: Mapping[str, Given], classes: Sequence[type], of_workload: type) -> dict[str, Given]:
    """Return the settings of ``classes`` and of a workload, after checking the latter; paths start at the file.

    Raises UsageError, also if there is a setting that neither the workload nor any command has.
    """
    check_files(places, [of_workload])
    found, names = dict[str, Given](), declared(*classes, of_workload)
    for place, values in places.items():
        check_known(values, {*declared(*CLASSES, of_workload)} - {*ONLY_FLAGS, "config"}, place)
        whole = located(values, Path(place), of_workload)
        found[place] = {name: value for name, value in whole.items() if name in names}
    return found


def storage_path(given: str | Path | None = None) -> str:
    """Return the storage of runs: as ``given``, else from the environment, the project or the default."""
    values = Layers(defaults()[0]).values if given is None else {"storage_path": given}
    return build(OutputConfig, values).storage_path


def in_order(
    recipes: Mapping[str, Given],
    defaults: Mapping[str, Given],
    saved: Mapping[str, Given],
    of_file: Mapping[str, Given],
    flags: Given,
) -> Layers:
    """Return all settings, the strongest last. Raises UsageError if there is no such recipe.

    A resumed run has its ``saved`` settings instead of the recipes', unless a flag or a file names a recipe again.
    """
    naming = Layers({**({} if saved else defaults), **of_file, FLAGS: flags})
    name = naming.values.get("recipe", "default")
    if name not in (*recipes, "default"):
        raise UsageError(f"there is no recipe {name}; known: {', '.join(recipes) or 'none'}")
    recipe = {} if name == "default" else {f"the recipe {name}": recipes[name]}
    if saved:
        return Layers({**defaults, **saved, **recipe, **of_file, FLAGS: flags})
    return Layers({"the default recipe": recipes.get("default", {}), **recipe, **defaults, **of_file, FLAGS: flags})


def _project_files() -> Iterator[Path]:
    with contextlib.suppress(OSError):  # the current folder is gone
        here = Path.cwd()
        yield from (path for folder in (here, *here.parents) if os.path.isfile(path := folder / _PROJECT_FILE))
