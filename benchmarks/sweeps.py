"""Compare the choices and the costs of sweeps by several seeds: of several schedulers, or of an earlier version.

    python benchmarks/sweeps.py                                    # about 9 minutes on two cores
    python benchmarks/sweeps.py --before COMMIT                    # about 25 minutes
    python benchmarks/sweeps.py --schedulers halving none          # about half an hour

Guards the choice of a sweep: trials that are stopped early save epochs, and cost no accuracy of the best configuration.

What follows ``--`` are flags of tune.py. For each seed, the sweeps run one after the other. A row has means over the
seeds: seconds from start to exit, epochs trained by trials, and what the best configuration reached on the validation
and the test set.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from before import ROOT, checked_out


def sweep(root: Path, storage: Path, *flags: str) -> dict[str, float]:
    """Run a sweep of the version in ``root``; return its figures."""
    where, start = ["--storage-path", str(storage), "--run-name", "sweep", "--quiet"], time.monotonic()
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(root)}
    job = [sys.executable, str(root / "jobs" / "tune.py"), *flags, *where]
    subprocess.run(job, check=True, capture_output=True, env=environment)
    seconds, run = time.monotonic() - start, storage / "sweep"
    result, best = (json.loads((run / name).read_text()) for name in ("result.json", "best.json"))
    table = next(file for file in (run / "members.csv", run / "sweep.csv") if file.exists())  # the latter: 3b8acb0's
    with table.open() as file:
        trials = list(csv.DictReader(file))
    searched = [name for name in list(trials[0])[1 : list(trials[0]).index("seed")] if name != "run"]
    chosen = [trial for trial in trials if all(trial[name] == str(best[name]) for name in searched)]
    return {
        "seconds": seconds,
        "epochs": sum(float(trial["epochs"]) for trial in trials),
        "validation": statistics.mean(float(trial["val_accuracy"]) for trial in chosen),
        "test": result["test_accuracy"],
    }


def main() -> None:
    """Run all sweeps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--schedulers", nargs="+", default=["halving"])
    parser.add_argument("--before", help="commit of an earlier version, whose default scheduler runs")
    parser.add_argument("flags", nargs="*", help="of tune.py, after --")
    args = parser.parse_args()
    rows: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    versions = {name: (ROOT, ["--scheduler", name]) for name in args.schedulers}
    with checked_out(args.before) if args.before else contextlib.nullcontext() as before:
        if args.before and before is None:
            parser.error(f"this clone has no commit {args.before}")
        if before:
            versions[args.before] = before, []
        for seed in args.seeds:
            for name, (root, flags) in versions.items():
                with tempfile.TemporaryDirectory() as storage:
                    rows[name].append(sweep(root, Path(storage), "--seed", str(seed), *flags, *args.flags))
                print(seed, name, {key: round(value, 4) for key, value in rows[name][-1].items()}, flush=True)
    print("\n| sweep | seconds | epochs | validation | test |\n|---|---|---|---|---|")
    for name, sweeps in rows.items():
        seconds, epochs, validation, test = (statistics.mean(each[key] for each in sweeps) for key in sweeps[0])
        print(f"| {name} | {seconds:.0f} | {epochs:.1f} | {validation:.2%} | {test:.2%} |")
    if args.before:
        pairs = zip(rows[args.schedulers[0]], rows[args.before], strict=True)
        ratios = sorted(now["seconds"] / then["seconds"] for now, then in pairs)
        print(f"seconds: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
