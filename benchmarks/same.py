"""Check that this version does the same as an earlier version.

    python benchmarks/same.py COMMIT     # 20 minutes on two cores

Guards the weights: a change that is not about the training leaves those of every run the same, bit for bit.

Runs both versions on this machine, one after the other. Compares the last weights of ten set-ups by SHA-256; a sweep's
table and choice, without times; the output of train, tune and evaluate, with times masked and lines sorted; and the
keys of every JSON file. Prints a line for each, and the differences. Exits with status 1 if weights, table or choice
differ.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from before import ROOT, checked_out
from safetensors.torch import load_file

ONE_EPOCH = ["--num-epochs", "1"]
TWO_WORKERS = ["--num-workers", "2", "--cpus-per-worker", "1", *ONE_EPOCH]
KILLED = "killed and resumed"
SETUPS: dict[str, list[str]] = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16", *ONE_EPOCH],
    "2 workers, shared memory": TWO_WORKERS,
    "2 workers, gloo": TWO_WORKERS,
    "reproducible, 1 worker": ["--reproducible", *ONE_EPOCH],
    "reproducible, 2 workers": ["--reproducible", *TWO_WORKERS],
    "shapes.py": ["--workload", "examples/shapes.py", *ONE_EPOCH],
    "diabetes.py": ["--workload", "examples/diabetes.py"],
    KILLED: ["--checkpoint-every", "50"],
    "sgd, EMA, clipping, micro-batches": [
        *("--optimizer", "sgd", "--learning-rate", "0.05", "--ema-decay", "0.99"),
        *("--clip-grad-norm", "1", "--micro-batch-size", "50", *ONE_EPOCH),
    ],
}
SWEEP = ["--num-trials", "4", "--max-concurrent-trials", "1", "--num-confirmed", "1", "--limit", "0.2", *ONE_EPOCH]
TIMES = ("images_per_s", "examples_per_s", "train_s")
"""Columns of sweep.csv that differ from sweep to sweep."""
MASKS = {
    r"^seconds .*": "seconds",
    r"\d+\.\d+ s\b": "SECONDS",
    r"[\d,]+ \w+/s": "RATE",
    r"[\d,]+ (?=done|stopped)": "RATE ",
    r"about [\d:]+ left": "TIME left",
}
# Turns shared memory off: is_supported() in training/shared_memory.py requires x86_64.
WITHOUT_SHARED_MEMORY = "import platform\nplatform.machine = lambda: 'unknown'\n"


@dataclass(frozen=True)
class Seen:
    """The results of one version."""

    weights: dict[str, str]
    """SHA-256 by set-up."""
    trials: list[str]
    """The rows of sweep.csv without times, and the chosen settings."""
    consoles: dict[str, list[str]]
    """Masked and sorted lines by command."""
    keys: dict[str, set[str]]
    """Keys by the name of the JSON file; nested keys as ``outer.inner``."""


class Version:
    """One version's code, with separate storage."""

    def __init__(self, root: Path, folder: Path, *more: str) -> None:
        self._root, self._more = root, more
        self._storage = folder / "runs"
        self._hooks = folder / "hooks"
        self._hooks.mkdir()
        (self._hooks / "sitecustomize.py").write_text(WITHOUT_SHARED_MEMORY)

    def see(self) -> Seen:
        """Run all set-ups, a sweep and an evaluation."""
        weights, consoles = {}, {}
        for setup, flags in SETUPS.items():
            name = re.sub(r"\W+", "-", setup)
            consoles[f"train, {setup}"] = self._train(name, setup, flags)
            weights[setup] = self._weights(name)
        consoles.pop(f"train, {KILLED}")  # where it resumes depends on the moment of the kill
        consoles["tune"] = self._run("tune", *SWEEP, "--run-name", "sweep")
        consoles["evaluate"] = self._run("evaluate", "fp32")
        return Seen(weights, list(self._trials()), consoles, self._keys())

    def _train(self, name: str, setup: str, flags: Sequence[str]) -> list[str]:
        named = ["--run-name", name, *flags]
        if setup != KILLED:
            return self._run("train", *named, shares_memory="gloo" not in setup)
        with self._started("train", *named) as job:
            for line in job.stdout or ():
                if re.match(r"epoch 1/2 +finished", line):
                    break
            job.kill()
        return self._run("train", "--run-name", name, "--resume")

    def _run(self, command: str, *flags: str, shares_memory: bool = True) -> list[str]:
        with self._started(command, *flags, shares_memory=shares_memory) as job:
            lines = [masked(line, self._storage) for line in job.stdout or () if not is_progress(line)]
        if job.returncode != 0:
            raise RuntimeError(f"{command} {flags} failed: {lines[-5:]}")
        return sorted(lines)

    def _started(self, command: str, *flags: str, shares_memory: bool = True) -> subprocess.Popen[str]:
        path = [str(self._root)] if shares_memory else [str(self._hooks), str(self._root)]
        return subprocess.Popen(
            [sys.executable, f"jobs/{command}.py", "--storage-path", str(self._storage), *flags, *self._more],
            cwd=self._root,
            env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _weights(self, name: str) -> str:
        *_, last = sorted((self._storage / name).glob("checkpoint_*/model.safetensors"))
        digest = hashlib.sha256()  # not of the file, whose header has changed
        for key, tensor in sorted(load_file(last).items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _trials(self) -> Iterator[str]:
        with (self._storage / "sweep" / "sweep.csv").open() as file:
            rows = [*csv.DictReader(file)]
        for row in rows:
            yield " ".join(f"{name}={value}" for name, value in row.items() if name not in TIMES)
        best = json.loads((self._storage / "sweep" / "best.json").read_text())
        yield " ".join(f"{name}={best[name]}" for name in rows[0] if name in best)  # the searched settings

    def _keys(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for file in self._storage.rglob("*.json"):
            found.setdefault(file.name, set()).update(keys_of(json.loads(file.read_text())))
        return found


def is_progress(line: str) -> bool:
    """Return whether a line reports progress; these come by the clock."""
    return line.rstrip().endswith(" left")


def masked(line: str, storage: Path) -> str:
    """Mask everything in a line that differs from run to run: times, rates, folders."""
    line = line.rstrip().replace(str(storage), "STORAGE")
    for pattern, name in MASKS.items():
        line = re.sub(pattern, name, line)
    return line


def keys_of(value: object, outer: str = "") -> Iterator[str]:
    """Yield the paths of all keys in a JSON value."""
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item, outer)
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{outer}{key}"
            yield from keys_of(item, f"{outer}{key}.")


def compare(before: Seen, now: Seen) -> bool:
    """Print the comparison; return whether weights, table and choice are equal."""
    is_same = True
    for setup, digest in before.weights.items():
        equal = now.weights[setup] == digest
        is_same &= equal
        print(f"weights  {setup}: {'equal' if equal else 'DIFFERENT'} {now.weights[setup][:16]}")
    equal = before.trials == now.trials
    is_same &= equal
    print(f"sweep    table and choice: {'equal' if equal else 'DIFFERENT'}")
    print_difference(before.trials, now.trials)
    for command, lines in before.consoles.items():
        print(f"console  {command}: {'equal' if lines == now.consoles[command] else 'different'}")
        print_difference(lines, now.consoles[command])
    for name in sorted(before.keys.keys() | now.keys.keys()):
        then, there = sorted(before.keys.get(name, ())), sorted(now.keys.get(name, ()))
        print(f"keys     {name}: {'equal' if then == there else 'different'}")
        print_difference(then, there)
    return is_same


def print_difference(before: Sequence[str], now: Sequence[str]) -> None:
    """Print the lines that differ."""
    for line in difflib.unified_diff(before, now, lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            print(f"         {line}")


def main() -> None:
    """Run both versions and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit of the earlier version")
    parser.add_argument("--plain-ray", action="store_true", help="run this version with --plain-ray")
    arguments = parser.parse_args()
    commit, more = arguments.commit, ["--plain-ray"] if arguments.plain_ray else []
    with checked_out(commit) as root, tempfile.TemporaryDirectory() as then, tempfile.TemporaryDirectory() as there:
        if root is None:
            parser.error(f"commit {commit} is not in this repository")
        before = Version(root, Path(then)).see()
        now = Version(ROOT, Path(there), *more).see()
    sys.exit(0 if compare(before, now) else 1)


if __name__ == "__main__":
    main()
