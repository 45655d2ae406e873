"""The reference and the table of errors name what the code has: keys, columns, variables and messages."""

import ast
import csv
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from pyarrow import parquet

from mnist_ray import schema
from mnist_ray.config import OutputConfig, SweepConfig, TrainConfig, WorkerConfig
from mnist_ray.many.points import Space
from mnist_ray.many.table import Table
from mnist_ray.schema import STATE_FILE
from mnist_ray.settings import declared
from tests.conftest import ROOT, Digits

SOURCES = [*(ROOT / "mnist_ray").rglob("*.py"), *(ROOT / "ray_fork").rglob("*.py")]
GIT_FILE = ROOT / "mnist_ray" / "provenance.py"  # whose variables are those of git's process
OTHER_CONSTANTS = {
    "ENABLE_RAY_CLUSTER",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
}  # spelled like our variables, or not to be set
CODE = re.compile(r"`([^`]+)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def first_cells(text: str) -> str:
    """Return the first cells of a page's tables."""
    return "\n".join(re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE))


def messages() -> str:
    """Return all texts in the code, with a NUL for each value that is put in."""
    texts = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_quoted_errors_are_those_of_the_code() -> None:
    known = messages()
    quoted = CODE.findall(first_cells(page("guides/debugging.md").partition("\n## Errors\n")[2].partition("\n## ")[0]))
    assert len(quoted) > 15
    for error in quoted:
        parts = [part.strip() for part in re.split("…|; ", error) if len(part.strip()) > 3]  # "; ": before the fix
        assert parts, error
        for part in parts:
            assert part in known, f"{part!r} of {error!r}"


def check(entries: Mapping[str, schema.Entry], found: Iterable[str], what: str) -> None:
    """Check that a table has exactly what was found, except for optional entries; capitals stand for another word."""
    patterns = {re.compile(re.sub(r"[A-Z]+", ".+", re.escape(name))): entry for name, entry in entries.items()}
    found = [*found]
    for name in found:
        assert any(pattern.fullmatch(name) for pattern in patterns), f"{what} has {name}"
    for pattern, entry in patterns.items():
        assert entry.is_optional or any(map(pattern.fullmatch, found)), f"{what} has no {pattern.pattern}"


def test_the_schema_has_the_files_keys_and_columns_of_a_run(finished_run: Path) -> None:
    check(schema.FILES["run"], os.listdir(finished_run), "the run")
    for name in (schema.RESULT_FILE, schema.ORIGIN_FILE):
        check(schema.KEYS[name], json.loads((finished_run / name).read_text()), name)
    for name in (schema.METRICS_FILE, schema.STEPS_FILE):
        with (finished_run / name).open(encoding="utf-8") as lines:
            check(schema.COLUMNS[name], next(csv.reader(lines)), name)
    columns = parquet.read_schema(finished_run / schema.COLUMNS_FILE).names
    check(schema.COLUMNS[schema.COLUMNS_FILE], columns, schema.COLUMNS_FILE)
    for folder in finished_run.glob("checkpoint_epoch*"):
        check(schema.FILES["checkpoint"], os.listdir(folder), folder.name)
        check(schema.KEYS[STATE_FILE], json.loads((folder / STATE_FILE).read_text()), STATE_FILE)
    check(schema.COLUMNS[schema.MEMBERS_FILE], Table(Digits, Space({}, {}, {})).columns, schema.MEMBERS_FILE)


def test_settings_of_a_run_are_in_the_reference(finished_run: Path) -> None:
    settings = json.loads((finished_run / "config.json").read_text()).keys()
    of_jobs = declared(TrainConfig, WorkerConfig, OutputConfig, SweepConfig)
    assert len(of_jobs.keys() & settings) > 20
    for name in of_jobs.keys() & settings:
        assert f"`{of_jobs[name].shown}`" in page("reference/flags.md")


@pytest.mark.parametrize("place", ["the code", "the page"])
def test_environment_variables_are_in_the_code_and_in_the_reference(place: str) -> None:
    pattern = re.compile(r"(RAY|[A-Z]{2,})_\w*[A-Za-z]|TMPDIR|RANK")
    in_code = set()
    for text in (file.read_text(encoding="utf-8") for file in SOURCES if file != GIT_FILE):
        if "os.environ" in text:
            values = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
            in_code |= {value for value in values if isinstance(value, str) and pattern.fullmatch(value)}
    on_page = {name for name in CODE.findall(page("reference/environment.md")) if pattern.fullmatch(name)}
    in_code -= OTHER_CONSTANTS
    assert not (in_code - on_page if place == "the code" else on_page - in_code)
