"""Reads settings files: TOML, YAML or JSON. Relative paths in the first two, which people write, start at the file."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_ray.config import CLASSES
from mnist_ray.errors import UsageError, first_line
from mnist_ray.settings import Given, declared, is_no_file, path_of

_MAX_BYTES = 2**20


@dataclass(frozen=True)
class SettingsFile:
    """A file with settings, as a person or a run has written it."""

    path: str
    values: Given

    @property
    def is_of_run(self) -> bool:
        """Whether it has the format in which runs save their settings."""
        return Path(self.path).suffix.lower() not in _WRITTEN


def read_settings(path: str) -> SettingsFile:
    """Read the settings of ``--config``. Raises UsageError."""
    file = path_of(path, "--config")
    return SettingsFile(path, located(_parsed(file.suffix.lower(), _text_of(file, path), path), file, *CLASSES))


def read_table(file: Path, *names: str) -> dict[str, Any] | None:
    """Return a table of a TOML file; None if there is no such table. Raises UsageError."""
    table: Any = _parsed(".toml", _text_of(file, str(file)), str(file))
    for number, name in enumerate(names, start=1):
        if name not in table:
            return None
        table = _as_object(table[name], f"[{'.'.join(names[:number])}] of {file}")
    return dict(table)


def _text_of(file: Path, path: str) -> str:
    try:
        if is_no_file(file):
            raise UsageError(f"the settings file {path} is not a file")
        if file.stat().st_size > _MAX_BYTES:
            raise UsageError(f"the settings file {path} is larger than 1 MiB")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the settings file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the settings file {path} is not UTF-8: {error}") from error


def _parsed(suffix: str, text: str, path: str) -> dict[str, Any]:
    """Return the settings in a text, whose format the file's suffix tells. Raises UsageError."""
    parse = _WRITTEN.get(suffix, _from_json)
    kind = parse.__name__.removeprefix("_from_").upper()
    try:
        values = parse(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not {kind}: {first_line(error)}") from error
    return _as_object(values, path)


def _as_object(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} must contain settings by their names")
    return values


def _from_toml(text: str) -> Any:
    return tomllib.loads(text)


def _from_yaml(text: str) -> Any:
    from ruamel.yaml import YAML  # YAML 1.2, where 1e-3 is a number and `no` is a text
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.events import AliasEvent

    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, AliasEvent):  # a few may stand for billions of values, or for what contains them
                line = event.start_mark.line + 1
                raise UsageError(f"line {line} has the alias *{event.anchor}; repeat the value instead")
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{place}") from error
    except YAMLError as error:
        raise ValueError(str(error)) from error


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values, names = dict(pairs), [name for name, _ in pairs]
    if twice := [name for name in values if names.count(name) > 1]:
        raise ValueError(f"it has {twice[0]} twice; leave one of them out")
    return values


def located(values: Given, file: Path, *classes: type) -> dict[str, Any]:
    """Return a person's settings, whose relative paths start at the file's folder. Runs write whole paths."""
    if file.suffix.lower() not in _WRITTEN:
        return dict(values)
    known, folder = declared(*classes), file.absolute().parent
    places = {name for name, about in known.items() if about.plain is Path or name == "storage_path"}
    code = {name for name, about in known.items() if about.code or name == "workload"}

    def whole(name: str, value: Any) -> Any:
        if name in code and isinstance(value, (list, dict)):  # several, or some with arguments
            moved = [whole(name, one) for one in value]
            return moved if isinstance(value, list) else dict(zip(moved, value.values(), strict=True))
        is_file = name in places or (name in code and re.search(r"\.py($|[:(])", str(value)))
        is_relative = is_file and isinstance(value, str) and value[:1] not in ("", "~") and "://" not in value
        return str(folder / value) if is_relative else value

    return {name: whole(name, value) for name, value in values.items()}


_WRITTEN = {".toml": _from_toml, ".yaml": _from_yaml, ".yml": _from_yaml}  # by people; JSON, also by runs
