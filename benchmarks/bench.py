"""Compare the project's speed with that of other programs.

    python benchmarks/bench.py                   # make bench: over an hour on two cores
    python benchmarks/bench.py --parts peers     # 24 minutes
    python benchmarks/bench.py --quick           # make bench-quick: four minutes

Guards the speed that the README states, beside the notebook's loop, plain DDP, a naive sweep and
an earlier version. Each of CASES has a target.

Each round runs every program once, one after the other: the project's and its peers', this version and an earlier one
(before.py), or a sweep and a naive sweep (sweep.py). A target applies to the ratio of two measurements of a round;
reported are the median and the spread over all rounds. ``--quick`` runs one short round on few images. It shows only
that everything works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import before
import numpy as np
import psutil

from mnist_ray.mnist import idx
from mnist_ray.provenance import git_commit, versions
from mnist_ray.workload import Arrays

HERE = Path(__file__).parent
TRAIN = HERE.parent / "jobs" / "train.py"
PARTS = ("peers", "before", "sweep")
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A target for the ratio of two measurements of a round.

    ``first`` rates are those of the first epoch, as in the bare loops.
    """

    name: str
    of: str
    over: str
    target: str
    """``>=`` or ``<=`` and a number."""

    def is_met(self, ratio: float) -> bool:
        """Return whether a ratio meets the target."""
        sign, number = self.target.split()
        return ratio >= float(number) if sign == ">=" else ratio <= float(number)


CASES = (
    Case("seconds until the worker trains, 1 worker / before", "start_s", "before_start_s", "<= 0.5"),
    Case("the same, 4 workers / before", "start_four_s", "before_start_four_s", "<= 0.45"),
    Case("seconds to the first line on the screen / before", "first_line_s", "before_first_line_s", "<= 0.25"),
    Case("seconds of `jobs/train.py`, start to exit / the notebook's script", "one_s", "notebook_s", "<= 0.33"),
    Case("seconds from a worker's kill until the run goes on / before", "restart_s", "before_restart_s", "<= 0.5"),
    Case("seconds of a sweep of 16 trials of 2 workers / before", "sweep_s", "before_sweep_s", "<= 0.6"),
    Case("memory of 4 workers (PSS) / before", "pss_four_mib", "before_pss_four_mib", "<= 0.6"),
    Case("processor seconds outside training / before", "cpu_outside_s", "before_cpu_outside_s", "<= 0.5"),
    Case("images/s while training / before", "rate", "before_rate", ">= 1.0"),
    Case("images/s through Ray, 2 workers / 2 processes under plain DDP", "two_first", "plain_two", ">= 0.97"),
    Case("the same / 2 processes that sum through shared memory as well", "two_first", "bare_two", ">= 0.97"),
    Case("images/s through Ray, 1 worker / the bare process, all cores", "one_first", "bare_one", ">= 0.97"),
    Case("images/s through Ray, default recipe and workers / the notebook's loop", "one", "notebook", ">= 5"),
    Case("images/s of the notebook's recipe (batch 8, fp32) / the notebook's loop", "recipe", "notebook", ">= 2"),
    Case("images/s of 2 workers / 1 worker with both cores", "two_first", "one_first", ">= 0.9"),
    Case("seconds of 16 one-worker trials / their time if they only trained", "sweep_s", "trials_s", "<= 1.25"),
    Case("seconds a trial of the same sweep / of a naive one", "sweep_trial_s", "naive_trial_s", "<= 0.33"),
)


def run(*command: object) -> tuple[str, float]:
    """Run a Python program; return the last line of its output, and the seconds from start to exit."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2], seconds


def train(folder: Path, name: str, *flags: object) -> dict[str, Any]:
    """Run the training job; return its result.json, with ``rows`` by epoch and ``wall_s`` from start to exit."""
    where = ["--storage-path", folder, "--run-name", name]
    _, seconds = run(TRAIN, *where, *flags)
    result: dict[str, Any] = json.loads((folder / name / "result.json").read_text())
    return result | {"wall_s": seconds, "rows": rows_of(folder / name)}


def rows_of(run_folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.csv, one per epoch."""
    with (run_folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def one_round(folder: Path, images: Path, flags: Sequence[object], epochs: int) -> Figures:
    """Run every program once; return the measurements by name."""
    peers = HERE / "peers"
    bare_data = flags[:2] if "--data-dir" in flags else ()
    figures: Figures = {}

    def note(name: str, printed: str, seconds: float) -> None:
        answer = json.loads(printed)
        figures[name], figures[f"{name}_s"] = answer["images_per_s"], seconds

    note("notebook", *run(peers / "notebook.py", images, epochs))
    one = train(folder, "one", *flags)
    figures |= {"one": one["examples_per_s"], "one_first": one["rows"][0]["examples_per_s"]}
    figures |= {"one_s": one["wall_s"], "one_accuracy": one["test_accuracy"]}
    note("bare_one", *run(peers / "bare.py", 1, 1, *bare_data))
    two = train(folder, "two", "--num-workers", 2, *flags)
    figures["two_first"] = two["rows"][0]["examples_per_s"]
    note("bare_two", *run(peers / "bare.py", 2, 1, *bare_data))
    note("plain_two", *run(peers / "bare.py", 2, 1, "--plain", *bare_data))
    recipe = train(folder, "recipe", "--recipe", "notebook", "--num-epochs", 1, *bare_data)
    figures["recipe"] = recipe["rows"][0]["examples_per_s"]
    return figures


def sweep_round(num_trials: int) -> Figures:
    """Run a sweep of one-epoch, one-worker trials, and a naive sweep."""
    naive_trials = max(2, num_trials // 2)  # each takes four times as long
    printed, _ = run(HERE / "sweep.py", "--num-trials", num_trials, "--num-naive-trials", naive_trials, "--json")
    figures: Figures = json.loads(printed)
    return figures


def write_images(folder: Path, source: tuple[Arrays, Arrays]) -> Path:
    """Write training and test images in torchvision's layout; return the folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    contents = (*vars(source[0]).values(), *vars(source[1]).values())
    arrays = zip(idx.FILES["train"] + idx.FILES["test"], contents, strict=True)
    for name, array in arrays:
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        (raw / name).write_bytes(header + array.tobytes())
    return raw.parent.parent


def case_row(case: Case, rounds: Sequence[Figures], is_judged: bool) -> dict[str, Any] | None:
    """Return a case's row: median and spread of its ratios. None if no round has both measurements."""
    pairs = [(f[case.of], f[case.over]) for f in rounds if case.of in f and case.over in f]
    ratios = [of / over for of, over in pairs]
    if not ratios:
        return None
    median = statistics.median(ratios)
    return {
        "case": case.name,
        "target": case.target,
        "median": round(median, 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
        "is_met": case.is_met(median) if is_judged else None,
        "of": round(statistics.median(of for of, _ in pairs), 1),
        "over": round(statistics.median(over for _, over in pairs), 1),
    }


def cases_as_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of the cases."""
    lines = [
        "| what | target | median ratio | of / over | least to most | rounds | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = (
            row["case"],
            row["target"],
            f"{row['median']:.2f}",
            f"{row['of']:,.4g} / {row['over']:,.4g}",
            f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}",
            row["rounds"],
            {True: "yes", False: "**no**", None: "not judged"}[row["is_met"]],
        )
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return lines


def heading() -> str:
    """Return a line about this machine and this version."""
    where, built = machine(), versions()
    place = f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB"
    return f"{place}; Python {built['python']}, torch {built['torch']}, Ray {built['ray']}; commit {git_commit()}."


def machine() -> dict[str, Any]:
    """Return this machine's processor, number of cores and memory."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def repeat(number: int, what: str, action: Callable[[Path], Figures]) -> list[Figures]:
    """Call ``action`` ``number`` times, each with a new folder; print and return the measurements."""
    figures = []
    for count in range(number):
        with tempfile.TemporaryDirectory() as folder:
            figures.append(action(Path(folder)))
        shown = ", ".join(f"{name} {value:,.2f}" for name, value in figures[-1].items())
        print(f"{what} {count + 1}/{number}: {shown}", flush=True)
    return figures


def main() -> None:
    """Run the parts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare with")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    measured: list[Figures] = []
    with tempfile.TemporaryDirectory() as temporary:
        flags: list[object] = []
        full = idx.load("train"), idx.load("test")
        if args.quick:
            full = Arrays(full[0].inputs[:6000], full[0].targets[:6000]), full[1]
        images = write_images(Path(temporary), full)
        if args.quick:
            flags = ["--data-dir", images / "MNIST" / "raw", "--validation-size", 600]
        if "peers" in args.parts:
            epochs = 1 if args.quick else 2
            measured += repeat(rounds, "peers", lambda storage: one_round(storage, images, flags, epochs))
        if "before" in args.parts:
            parts = ["one"] if args.quick else before.PARTS
            measured += repeat(rounds, "before", lambda storage: before.one_round(storage, flags, parts))
        if "sweep" in args.parts:
            measured += repeat(rounds, "sweep", lambda storage: sweep_round(2 if args.quick else 16))
    rows = [row for case in CASES if (row := case_row(case, measured, is_judged=not args.quick)) is not None]
    print("\n".join([heading(), "", *cases_as_markdown(rows)]))


if __name__ == "__main__":
    main()
