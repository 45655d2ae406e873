"""Writes what the docs take from the code: python docs/write_reference.py. A test compares it.

These are pages of docs/reference, the tables of files.md, and the numbers of lines in the tour's tables.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mnist_ray
from mnist_ray import cli, config, errors, schema, settings
from mnist_ray.flags import Parser, title_of
from mnist_ray.job.rules import OF_DATA, OF_SETTINGS
from mnist_ray.predictions.predictor import Prediction, Predictor
from mnist_ray.report.run_files import Run
from mnist_ray.settings import Choice, Range, Setting, declared, flag
from mnist_ray.tools.compare import Comparison, Verdict
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training import events
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Arrays, Blocks, Classification, Data, Metric, Picture, Regression, Workload, sources

FOLDER = Path(__file__).parent / "reference"
FILES = FOLDER / "files.md"
TOUR = Path(__file__).parent / "understand" / "tour.md"
NOTE = "Written by `python docs/write_reference.py` from the code."
TRAINING = (config.TrainConfig, config.WorkerConfig, config.OutputConfig, config.SourceConfig)
OF_JOBS: dict[str, tuple[type, ...]] = {"train": TRAINING, "tune": (config.SweepConfig,)}
NOTES = {
    "tune": "The flags of `train` apply to each trial, except `--num-seeds`, `--folds` without `--fold`, and"
    " `--num-workers 0`.",
    "predict": "With `--input`, give no IMAGE_OR_FOLDER.",
}
KINDS = {int: "integer", float: "number", str: "text", Path: "path", tuple: "list", bool: "on or off"}
INTRODUCTION = """\
One setting has three forms: a flag, a name in a [settings file](../guides/settings.md#settings-files), and a keyword of
the [Python function](python.md).

| where | form |
|---|---|
| command line | `--batch-size 64`, `--reproducible`, `--no-reproducible`, `--set momentum=0.95` |
| TOML | `batch_size = 64`, `reproducible = true` |
| YAML | `batch_size: 64`, `reproducible: true` |
| Python | `train(batch_size=64, reproducible=True)` |

Settings that few runs need have no flag: set them with `--set NAME=VALUE`. Write lists and `true` as in JSON.
[Rules](rules.md) lists which settings exclude each other.

A workload's recipe may have other defaults: `train --help` shows them, and the workload's own settings. A dash means
that the setting is unset; in a file or on the command line, `none` unsets a number. Settings files are for `train`,
`tune` and `view`; the other commands take from a project only the storage path."""

WHERE_FROM = (
    "Import `Callback` from `mnist_ray.training.callback`, `Tracker` and `Ending` from `mnist_ray.trackers`, and "
    "events from `mnist_ray.training.events`."
)
ABOUT_WORKLOADS = (
    "What a workload may define. Import the classes from `mnist_ray.workload`. [Your own "
    "workload](../guides/workload.md) shows how to write one; [Python](python.md) has `Data`, `Metric` and others."
)
ABOUT_RULES = (
    "A job checks these before it starts, those about data once the data are loaded. The error also names the file or "
    "recipe that a setting comes from. Only a setting that is given with the command or call must have an effect; "
    "a file's may go unused."
)


def flags() -> str:
    """Return the page of all flags, by command."""
    lines = ["# Flags and settings", "", NOTE, "", *INTRODUCTION.splitlines()]
    for name, command in cli.COMMANDS.items():
        purpose = (inspect.getdoc(command) or "").splitlines()[0]
        classes = OF_JOBS.get(name) or cli.classes_of(command)
        parser = Parser("", *classes)
        parser.prog = name
        usage = parser.format_help().splitlines()[0].removeprefix(f"usage: {name} ")
        lines += ["", f"## {name}", "", f"    mnist-ray {name} {usage}", ""]
        lines += textwrap.wrap(f"{purpose} {NOTES.get(name, '')}", 120)
        tables = {title_of(one): declared(one) for one in classes} if name in OF_JOBS else {"": declared(*classes)}
        for title, settings_of_table in tables.items():
            lines += ["", f"### {title}"] * (len(tables) > 1)
            lines += ["", "| flag | default | values | meaning |", "|---|---|---|---|"]
            lines += [row_of(about) for about in settings_of_table.values()]
    return "\n".join(lines) + "\n"


def row_of(about: Setting) -> str:
    """Return a setting's row."""
    parts = about.help.split("; ")
    chosen = [part for part in parts if part.startswith("default: ")]  # what the job does if the setting is unset
    default = about.unset if about.default is None else about.default
    if about.default in (None, ()) and about.unset == "none":
        default = chosen[0].removeprefix("default: ") if chosen else "–"
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, float):
        default = f"{default:g}"
    if about.default == "":
        default = "–"
    has_opposite = about.plain is bool and about.has_flag and not about.name.startswith("no_")
    name = f"`{about.shown}`" + (f", `--no-{flag(about.name)[2:]}`" if has_opposite else "")
    meaning = "; ".join(part for part in parts if part not in chosen).partition(": FILE.py[")[0]
    meaning = re.sub(r"(?<!\S)--[a-z-]+", r"`\g<0>`", meaning)
    return f"| {name} | {default} | {values_of(about)} | {meaning}{searched(about)} |"


def values_of(about: Setting) -> str:
    """Return which values a setting may have."""
    if about.arguments and about.plain is not tuple:
        return ", ".join(f"`{choice}`" for choice in about.arguments)
    kind = f"`{about.metavar}`" if about.metavar else KINDS[about.plain]
    allowed = about.must.removeprefix("must ").removeprefix("be ")
    if not allowed:
        return "`FILE.py[:NAME][(KEY=VALUE, …)]` or module; repeat it for several" if about.code else kind
    if allowed == "a positive number":
        return f"{kind} above 0"
    if allowed.startswith("in "):
        return f"{kind} {allowed}"
    if allowed.startswith("at least"):
        return f"{kind}, {allowed}"
    if re.match(r"[\d,]+ to ", allowed):
        return f"{kind} from {allowed}"
    return allowed.replace("end in ", "path, with suffix ")


def searched(about: Setting) -> str:
    """Return which values a sweep tries by default."""
    if isinstance(about.search, Choice):
        return f"; a sweep tries {', '.join(map(str, about.search.options))}"
    if isinstance(about.search, Range):
        scale = " on a logarithmic scale" * about.search.log
        return f"; a sweep tries {about.search.low:g} to {about.search.high:g}{scale}"
    return ""


def python() -> str:
    """Return the page of the Python interface."""
    lines = ["# Python", "", NOTE, "", "## Functions of mnist_ray", ""]
    lines += ["Keywords are the [flags](flags.md) of the command with the same name, and a workload's own settings."]
    for name in ("train", "tune", "evaluate", "compare", "predict", "load_predictor", "load_run"):
        lines += about_member(inspect.unwrap(getattr(mnist_ray, name)), name)
    lines += ["", "## What they return and raise"]
    for a_class in (
        Run,
        Comparison,
        Verdict,
        Prediction,
        Predictor,
        errors.UsageError,
        errors.JobError,
    ):
        module = "mnist_ray.errors." if a_class.__module__ == errors.__name__ else ""
        lines += about_class(a_class, f"{module}{a_class.__name__}", has_signature=False)
    lines += ["", "## Data", "", "Import these, and those below, from `mnist_ray.workload`."]
    lines += [line for a_class in (Data, Arrays, Blocks) for line in about_class(a_class)]
    lines += about_member(sources.pictures, "sources.pictures")
    lines += about_member(sources.Parquet, "sources.Parquet")
    lines += about_member(sources.huggingface, "sources.huggingface")
    lines += ["", "## Settings of a workload"]
    for name in ("setting", "Choice", "Range", "at_least", "within", "positive", "fraction"):
        lines += about_member(getattr(settings, name), name)
    lines += ["", "## Metrics and images"]
    lines += [line for a_class in (Metric, Picture) for line in about_class(a_class)]
    lines += ["", "## Callbacks and trackers", "", *textwrap.wrap(WHERE_FROM, 120)]
    lines += [
        *about_class(Callback, has_signature=False),
        *about_class(Tracker),
        *about_class(Ending, has_signature=False),
    ]
    for event in (events.Started, events.Progress, events.EpochFinished, events.Validated):
        lines += about_class(event, has_signature=False)
    return "\n".join(lines) + "\n"


def workload() -> str:
    """Return the page of what a workload may define."""
    lines = ["# Workload", "", NOTE, ""]
    lines += textwrap.wrap(ABOUT_WORKLOADS, 120)
    for a_class in (Workload, Classification, Regression):
        lines += ["", f"## {a_class.__name__}", "", *documented(a_class)]
        for title, rows in grouped(a_class).items():
            lines += ["", f"### {title} of {a_class.__name__}", "", "| name | meaning |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def grouped(a_class: type) -> dict[str, list[str]]:
    """Return rows of the public members that a class itself defines, by what they are; no empty groups."""
    groups: dict[str, list[str]] = {"Attributes": [], "Methods": [], "Properties": []}
    comments = comments_of(a_class)
    types = {field.name: f"``{field.type}``" for field in fields_of(a_class)}
    for name in dict.fromkeys([*getattr(a_class, "__annotations__", ()), *vars(a_class)]):
        value = vars(a_class).get(name)
        if isinstance(value, (property, functools.cached_property)):
            kind, call, meaning = "Properties", "", inspect.getdoc(value) or ""
        elif inspect.isfunction(value):
            kind, call, meaning = "Methods", signature_of(inspect.unwrap(value)), inspect.getdoc(value) or ""
        else:
            kind, call, meaning = "Attributes", "", comments.get(name, types.get(name, ""))
        if meaning and not name.startswith("_"):
            text = " ".join(meaning.split()).replace("``", "`").replace("|", "\\|")
            groups[kind].append(f"| `{name}{call}` | {text} |")
    return {kind: rows for kind, rows in groups.items() if rows}


def fields_of(a_class: type) -> tuple[dataclasses.Field[Any], ...]:
    """Return a dataclass's fields; none of another class."""
    return dataclasses.fields(a_class) if dataclasses.is_dataclass(a_class) else ()


def about_class(a_class: type, name: str = "", *, has_signature: bool = True) -> list[str]:
    """Return the section of a class, with a table of its members."""
    rows = [row for of_kind in grouped(a_class).values() for row in of_kind]
    table = ["", "| name | meaning |", "|---|---|", *rows] if rows else []
    has_signature = has_signature and "__init__" in vars(a_class)
    return [*about_member(a_class, name or a_class.__name__, has_signature=has_signature), *table]


def about_member(member: Any, name: str, *, has_signature: bool = True) -> list[str]:
    """Return the section of a function or a class."""
    signature = ["", f"    {name}{signature_of(member)}"] if has_signature else []
    return ["", f"### {name.removeprefix('mnist_ray.errors.')}", *signature, "", *documented(member)]


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
            found[name] = below.strip().strip('"')
    return found


def signature_of(function: Any) -> str:
    """Return the parameters without types and `self`; all keywords of `train` and `tune` are flags."""
    signature = inspect.signature(function, follow_wrapped=False)
    given = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    plain = [parameter.replace(annotation=parameter.empty) for parameter in given]
    text = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return text.replace("=<factory>", "={}")  # of a dataclass's field


def documented(member: Any) -> list[str]:
    """Return the docstring as Markdown."""
    return (inspect.getdoc(member) or "").replace("``", "`").splitlines()


def rules() -> str:
    """Return the page of the rules between settings."""
    lines = ["# Rules between settings", "", NOTE, "", *textwrap.wrap(ABOUT_RULES, 120)]
    titles = {
        "What cannot be combined": [rule for rule in OF_SETTINGS if rule.kind == "error"],
        "What does not fit the data": [rule for rule in OF_DATA if rule.kind == "error"],
        "What has no effect": [rule for rule in (*OF_SETTINGS, *OF_DATA) if rule.kind == "no effect"],
        "What is only noted": [rule for rule in OF_DATA if rule.kind == "note"],
    }
    for title, of_title in titles.items():
        lines += ["", f"## {title}", "", "| settings | error | what to do |", "|---|---|---|"]
        for rule in of_title:
            names = ", ".join(f"`{name}`" for name in rule.settings)
            problem = re.sub(r"{[^}]*}", "…", rule.problem)
            lines.append(f"| {names} | {problem} | {rule.fix} |")
    return "\n".join(lines) + "\n"


def tour() -> str:
    """Return the tour, with the number of lines of the files that its tables link to."""

    def counted(row: re.Match[str]) -> str:
        files = [TOUR.parent / link for link in re.findall(r"\]\((.+?)\)", row[1])]
        num_lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        return f"| {row[1]} | {num_lines} |"

    return re.sub(r"^\| (\[.+?) \| \d+ \|", counted, TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)


def files() -> str:
    """Return the page of a run's files, with its tables as the schema has them."""
    tables = {f"file of a {kind} | content": entries for kind, entries in schema.FILES.items()}
    tables |= {f"key of `{file}` | meaning": keys for file, keys in schema.KEYS.items()}
    tables |= {f"column of `{file}` | meaning": columns for file, columns in schema.COLUMNS.items()}
    text = FILES.read_text(encoding="utf-8")
    for header, entries in tables.items():
        first = re.escape(f"| {header} |")
        text = re.sub(rf"^{first}\n(\|.*\n)+", table_of(header, entries), text, flags=re.MULTILINE)
    return text


def table_of(header: str, entries: Mapping[str, schema.Entry]) -> str:
    """Return a table, in which neighbours with the same entry share a row."""
    lines = [f"| {header} |", "|---|---|"]
    for entry, names in itertools.groupby(entries, entries.__getitem__):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {entry.meaning} |")
    return "\n".join([*lines, ""])


PAGES = {
    **{FOLDER / f"{page.__name__}.md": page for page in (flags, rules, python, workload)},
    TOUR: tour,
    FILES: files,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
