"""Writes the pages of docs/reference that come from the code: python docs/write_reference.py. A test compares them."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mnist_ray
from mnist_ray import config
from mnist_ray.api import Run, SweptRun
from mnist_ray.settings import Choice, Range, Setting, declared, flag, title_of
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Arrays, Blocks, Classification, Data, Metric, Picture, Regression, Workload, sources

FOLDER = Path(__file__).parent / "reference"
NOTE = "Written by `python docs/write_reference.py` from the code."
TRAINING = (config.TrainConfig, config.WorkerConfig, config.OutputConfig, config.SourceConfig)
COMMANDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "train": ("train, test, and write the run's files", TRAINING),
    "tune": ("search settings, then train the best; also the flags of `train`", (config.SweepConfig,)),
    "evaluate": ("test a run's checkpoint", (config.EvaluationConfig,)),
    "predict": ("predict for your own images or texts", (config.PredictionConfig,)),
    "view": ("look at the data", (config.ViewConfig,)),
    "export": ("write a trained model as a program of torch.export", (config.ExportConfig,)),
    "reproduce": ("train a run again, and compare the weights", (config.ReproductionConfig,)),
    "runs": ("list the runs in the storage", (config.RunsConfig,)),
}


def flags() -> str:
    """Return the page of all flags, by command."""
    lines = ["# Flags and settings", "", NOTE, ""]
    lines += wrapped(
        "A flag is also a keyword of the Python function and, with underscores, a name in settings files. A workload's "
        "recipe may have other defaults; `--help` shows them, and the workload's own settings. All commands on runs "
        "also have `--storage-path`, `--workload` and `--config`."
    )
    for name, (purpose, classes) in COMMANDS.items():
        lines += ["", f"## {name}", "", f"`mnist-ray {name}`, `python jobs/{name}.py`: {purpose}."]
        for config_class in classes:
            title = title_of(config_class)
            lines += ["", f"### {title if title != 'Options' else 'Where the settings come from'}"] * (len(classes) > 1)
            lines += ["", "| flag | default | values | |", "|---|---|---|---|"]
            lines += [row_of(about) for about in declared(config_class).values()]
    return "\n".join(lines) + "\n"


def row_of(about: Setting) -> str:
    """Return a setting's row."""
    default = about.unset if about.default is None else about.default
    name = f"`{flag(about.name)}`" + (f" or `--no-{flag(about.name)[2:]}`" if about.plain is bool else "")
    return f"| {name} | {'off' if default is False else default} | {values_of(about)} | {about.help} |".replace(
        "|  |", "| |"
    )


def values_of(about: Setting) -> str:
    """Return which values a setting may have, and its search space."""
    kind = {int: "whole number", float: "number", str: "text", Path: "path", tuple: "list", bool: ""}[about.plain]
    if about.arguments and about.plain is not tuple:
        kind = ", ".join(f"`{choice}`" for choice in about.arguments)
    if about.must:
        kind += f", {about.must.removeprefix('must be ')}"
    if isinstance(about.search, Choice):
        kind += f"; searched: {', '.join(map(str, about.search.options))}"
    if isinstance(about.search, Range):
        kind += f"; searched: {about.search.low:g} to {about.search.high:g}{', log' * about.search.log}"
    return kind


def python() -> str:
    """Return the page of the Python interface."""
    lines = ["# Python", "", NOTE, "", "## Functions of mnist_ray"]
    for name in ("train", "tune", "evaluate", "predict", "load_run"):
        function = inspect.unwrap(getattr(mnist_ray, name))
        lines += ["", f"### {name}", "", f"    {name}{short_signature(function)}", "", *documented(function)]
    for title, classes in {
        "What they return": (Run, SweptRun),
        "Data": (Data, Arrays, Blocks),
        "Sources": (),
        "Figures": (Metric, Picture),
        "Callbacks and trackers": (Callback, Tracker, Ending),
    }.items():
        lines += ["", f"## {title}"]
        if title == "Sources":
            for member in (sources.pictures, sources.Parquet):
                lines += ["", f"### sources.{member.__name__}", "", *documented(member)]
        for a_class in classes:
            lines += ["", f"### {a_class.__name__}", "", *documented(a_class), *members(a_class)]
    return "\n".join(lines) + "\n"


def workload() -> str:
    """Return the page of what a workload may define."""
    lines = ["# Workload", "", NOTE, "", "Import from `mnist_ray.workload`."]
    for a_class in (Workload, Classification, Regression):
        lines += ["", f"## {a_class.__name__}", "", *documented(a_class), *members(a_class)]
    return "\n".join(lines) + "\n"


def members(a_class: type) -> Iterator[str]:
    """Yield a table of the public members that a class itself defines."""
    rows = []
    comments = comments_of(a_class)
    for name, value in vars(a_class).items():
        if name.startswith("_") or inspect.isclass(value):
            continue
        member = value.fget if isinstance(value, property) else inspect.unwrap(value) if callable(value) else None
        if member is None or not inspect.getdoc(member):
            said = comments.get(name, "")
        else:
            said = " ".join((inspect.getdoc(member) or "").split())
        if said:
            call = short_signature(member) if inspect.isfunction(member) and not isinstance(value, property) else ""
            rows.append(f"| `{name}{call}` | {said.replace('``', '`').replace('|', chr(92) + '|')} |")
    for field in dataclasses.fields(a_class) if dataclasses.is_dataclass(a_class) else ():
        if field.name in comments and not any(row.startswith(f"| `{field.name}`") for row in rows):
            rows.append(f"| `{field.name}` | {comments[field.name]} |")
    if rows:
        yield from ("", "| | |", "|---|---|", *rows)


def comments_of(a_class: type) -> dict[str, str]:
    """Return what the source says about attributes: in a comment behind one, or a string below it."""
    found, lines = {}, inspect.getsource(a_class).splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        name, colon, rest = line.strip().partition(": ")
        if not (colon and name.isidentifier()) or not line.startswith("    ") or line.startswith("     "):
            continue
        if "  # " in rest:
            found[name] = rest.partition("  # ")[2]
        elif below.strip().startswith('"""'):
            found[name] = below.strip().strip('"').replace("``", "`")
    return found


def short_signature(function: Any) -> str:
    """Return a function's parameters without types and `self`; all keywords of `train` and `tune` are flags."""
    words = []
    for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
        stars: dict[Any, str] = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}
        prefix = stars.get(parameter.kind, "")
        has_default = parameter.default is not parameter.empty
        if parameter.name != "self":
            words.append(f"{prefix}{parameter.name}" + (f"={parameter.default!r}" if has_default else ""))
    return f"({', '.join(words)})"


def documented(member: Any) -> list[str]:
    """Return the docstring as Markdown."""
    return (inspect.getdoc(member) or "").replace("``", "`").splitlines()


def wrapped(text: str) -> Iterable[str]:
    """Return a paragraph in lines of at most 120 characters."""
    from textwrap import wrap

    return wrap(text, 120, break_long_words=False, break_on_hyphens=False)


PAGES = {"flags.md": flags, "python.md": python, "workload.md": workload}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"{FOLDER / name}\n")
