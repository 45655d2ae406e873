"""One version's code: runs set-ups, and gathers what must stay the same."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import small
import torch
from pyarrow import parquet as pq
from safetensors.torch import load_file
from setups import Setup

OF_SWEEPS = {"sweep.csv": ("trial",), "members.csv": ("member", "run", "fold")}
"""The tables of sweeps, that of 3b8acb0 and today's, with the columns that are not compared."""
NOT_COMPARED = re.compile(
    r"_s$|^(format_version|formats|seconds|num_workers|workers|is_resumed|command_line|git_commit|versions)$"
)
"""Columns of tables, and keys of result.json: times, and what describes a version or a machine."""
MASKS = {
    r"^seconds .*": "seconds",
    r"^time .*": "time",
    r"\d+\.\d+ s\b": "SECONDS",
    r"[\d,]+ \w+/s": "RATE",
    r"[\d,]+ (?=done|stopped)": "RATE ",
    r"about [\d:]+ left": "TIME left",
}
# Turns shared memory off: is_supported() in parallel/shared_memory.py requires x86_64.
WITHOUT_SHARED_MEMORY = "import platform\nplatform.machine = lambda: 'unknown'\n"
Lines = dict[str, list[str]]


@dataclass
class Seen:
    """What a version did in one set-up."""

    facts: Lines = field(default_factory=dict)
    """By name, what must be equal: weights, tables, results and predictions."""
    consoles: Lines = field(default_factory=dict)
    """Masked and sorted lines, by command."""
    keys: Lines = field(default_factory=dict)
    """Keys by the name of the JSON file; nested keys as ``outer.inner``."""


class Version:
    """The code in ``root``; ``folder`` is for what it writes, and ``inputs`` has the set-ups' input files."""

    def __init__(self, root: Path, folder: Path, inputs: Path, more: Sequence[str] = ()) -> None:
        self._root, self._folder, self._inputs, self._more = root, folder, inputs, more
        self._hooks = folder / "hooks"
        self._hooks.mkdir(parents=True)
        (self._hooks / "sitecustomize.py").write_text(WITHOUT_SHARED_MEMORY)

    def see(self, name: str, setup: Setup) -> Seen:
        """Run a set-up. Raises RuntimeError if a command fails, or ends before it is killed."""
        storage, seen = self._folder / re.sub(r"\W+", "-", name), Seen()
        storage.mkdir()
        last = len(setup.commands) - 1
        for number, words in enumerate(setup.commands):
            output = storage / f"console-{number}"
            job = self._start(setup, words, storage, output)
            is_killed = setup.killed_at != "" and number == last - 1
            if is_killed:
                while job.poll() is None and not any(storage.glob(setup.killed_at)):
                    time.sleep(0.02)
                job.kill()
            job.wait()
            lines = output.read_text(encoding="utf-8").splitlines()
            is_right = job.returncode == -9 if is_killed else (job.returncode != 0) == (setup.fails and number == 0)
            if not is_right:
                raise RuntimeError(f"{' '.join(words)} exited with {job.returncode}: {lines[-8:]}")
            if setup.has_console:
                command = f"{words[0]} ({number + 1})"
                seen.consoles[command] = sorted(self._masked(line, storage) for line in lines if not is_progress(line))
        if any(":Dies" in word for words in setup.commands for word in words) and not (storage / small.DEAD).exists():
            raise RuntimeError(f"{name}: no worker was killed")
        seen.facts = {name: lines for name, lines in facts_in(storage) if lines}
        for file in sorted(storage.rglob("*.json")):
            keys = {*seen.keys.get(file.name, ()), *keys_of(json.loads(file.read_text()))}
            seen.keys[file.name] = sorted(keys)
        return seen

    def _masked(self, line: str, storage: Path) -> str:
        """Mask everything in a line that differs from run to run: times, rates, folders."""
        line = line.rstrip().replace(str(storage), "STORAGE").replace(str(self._inputs), "INPUTS")
        for pattern, name in MASKS.items():
            line = re.sub(pattern, name, line)
        return line

    def _start(self, setup: Setup, words: Sequence[str], storage: Path, output: Path) -> subprocess.Popen[bytes]:
        command, *flags = (word.format(inputs=self._inputs, storage=storage) for word in words)
        program = [f"jobs/{command}.py"] if command in ("train", "tune", "evaluate") else ["-m", "mnist_ray", command]
        path = [str(self._root)] if setup.shares_memory else [str(self._hooks), str(self._root)]
        own = {"RAY_ADDRESS": "local", "PYTHONPATH": os.pathsep.join(path), small.RUN: str(storage / "run")}
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *program, *flags, "--storage-path", str(storage), *self._more],
                cwd=self._root,
                env={**os.environ, **own},
                stdout=file,
                stderr=subprocess.STDOUT,
            )


def facts_in(storage: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield what the commands have written, by name; of a sweep, its table, choice and result."""
    sweeps = {file.parent for file in storage.rglob("best.json")}
    for sweep in sorted(sweeps):
        yield from facts_of_sweep(sweep, str(sweep.relative_to(storage)))
    newest = {file.parent.parent: file.parent for file in sorted(storage.rglob("checkpoint_*/state.json"))}
    for run, checkpoint in sorted(newest.items()):
        if sweeps & {run, *run.parents}:
            continue
        for kind in ("model", "trained", "optimizer"):
            files = sorted(checkpoint.glob(f"{kind}*.safetensors"))
            yield f"{kind} {run.relative_to(storage)}", [digest_of(files)] if files else []
    for file in sorted(path for path in storage.rglob("*") if path.is_file()):
        name = str(file.relative_to(storage))
        if sweeps & {*file.parents}:
            continue
        if file.name == "metrics.csv":
            with file.open(encoding="utf-8") as table:
                yield name, [" ".join(figures_of(row)) for row in csv.DictReader(table)]
        elif file.name == "result.json":
            yield name, sorted(figures_of(json.loads(file.read_text())))
        elif file.suffix == ".parquet":
            yield name, [digest_of_columns(file)]


def facts_of_sweep(run: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the trials of a sweep, the searched settings of its choice, and the result with its weights."""
    table = next(run / file for file in OF_SWEEPS if (run / file).exists())
    with table.open(encoding="utf-8") as file:
        rows = [{key: row[key] for key in row if key not in OF_SWEEPS[table.name]} for row in csv.DictReader(file)]
    yield f"trials of {name}", sorted(" ".join(sorted(figures_of(row))) for row in rows)
    best, result = (json.loads((run / file).read_text()) for file in ("best.json", "result.json"))
    yield f"choice of {name}", [f"{key}={value}" for key, value in sorted(best.items()) if key in rows[0]]
    known = {key: value for key, value in result.items() if key not in ("checkpoint", "members")}
    yield f"{name}/result.json", sorted(figures_of(known))
    yield f"model {name}", [digest_of([run / result["checkpoint"] / "model.safetensors"])]
    yield f"predictions of {name}", [digest_of_columns(run / "predictions.parquet")]


def digest_of_columns(file: Path) -> str:
    """Return a digest of a Parquet file's values."""
    columns = sorted(pq.read_table(file).to_pydict().items())  # in 3b8acb0, those of folds are in no order
    return hashlib.sha256(repr(columns).encode()).hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """Return a digest of the tensors in some files; not of the files, whose headers may change."""
    digest = hashlib.sha256()
    for file in files:
        for key, tensor in sorted(load_file(file).items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def figures_of(values: dict[str, object]) -> Iterator[str]:
    """Yield all values except times and what describes a version or a machine."""
    for name, value in values.items():
        if NOT_COMPARED.search(name):
            continue
        if isinstance(value, dict):
            yield from (f"{name}.{figure}" for figure in figures_of(value))
        else:
            yield f"{name}={value}"


def is_progress(line: str) -> bool:
    """Return whether a line reports progress; these come by the clock."""
    return line.rstrip().endswith(" left")


def keys_of(value: object, outer: str = "") -> Iterator[str]:
    """Yield the paths of all keys in a JSON value."""
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item, outer)
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{outer}{key}"
            yield from keys_of(item, f"{outer}{key}.")
