"""Check that this version does the same as an earlier version.

    python benchmarks/same.py COMMIT             # 25 minutes on two cores
    python benchmarks/same.py COMMIT --quick     # seven of the set-ups: 3 minutes
    python benchmarks/same.py --prove            # that set-ups notice faults: 6 minutes

Guards the weights: a change that is not about the training leaves those of every run the same, bit for bit.

Runs both versions on this machine, one after the other, in each set-up of ``setups.py``. Compares the last weights and
optimizer state, predictions by SHA-256; tables, results and a sweep's choice, without times; the output of commands,
with times masked and lines sorted; and the keys of every JSON file. Prints a line for each set-up, and the differences.
Exits with status 1 if weights, predictions, tables, results or the choice differ. Consoles and keys may: also a figure
that only one version writes is a difference in keys.

With ``--prove``, compares this version with copies of it that have the faults of ``faults.py``, each in its set-up.
Exits with status 1 if a set-up does not notice its fault. With ``--cache``, what the earlier version does is kept in a
folder, for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import small
import versions
from before import ROOT, checked_out, this_version
from faults import FAULTS, Fault, faulty_copy
from setups import SETUPS, Setup, write_inputs
from versions import Lines, Seen, Version


def is_same(name: str, before: Seen, now: Seen) -> bool:
    """Print the comparison of a set-up; return whether the facts are equal."""
    facts = [of_common_figures(seen.facts, other.facts) for seen, other in ((before, now), (now, before))]
    is_equal = facts[0] == facts[1]
    print(f"{'equal' if is_equal else 'DIFFERENT'}: {name}, {len(now.facts)} facts", flush=True)
    print_differences("", *facts)
    print_differences("console of ", before.consoles, now.consoles)
    print_differences("keys of ", before.keys, now.keys)
    return is_equal


def of_common_figures(facts: Lines, others: Lines) -> Lines:
    """Return facts, results without the figures that the other version does not have; its keys tell of these.

    The score is left out: versions rank checkpoints by the same metric and loss, but write them as other numbers. So is
    the weights' digest, which depends on how a checkpoint's files are checked; the weights themselves are compared.
    """
    common = dict(facts)
    for name in common.keys() & others.keys():
        if name.endswith("result.json"):
            left_out = {"checkpoint_metrics.val_score", "weights_sha256"}
            known = {line.partition("=")[0] for line in others[name]} - left_out
            common[name] = [line for line in facts[name] if line.partition("=")[0] in known]
        if name.endswith("metrics.csv"):
            known = {value.partition("=")[0] for line in others[name] for value in line.split()}
            rows = [[value for value in line.split() if value.partition("=")[0] in known] for line in facts[name]]
            common[name] = [" ".join(row) for row in rows]
    return common


def print_differences(kind: str, before: Lines, now: Lines) -> None:
    """Print the lines that differ, with the name of what they are in."""
    for name in sorted(before.keys() | now.keys()):
        then, there = before.get(name, []), now.get(name, [])
        if then != there:
            print(f"    {kind}{name}")
        for line in difflib.unified_diff(then, there, lineterm="", n=0):
            if not line.startswith(("---", "+++", "@@")):
                print(f"        {line}", flush=True)


def cached(see: Callable[[str, Setup], Seen], name: str, setup: Setup, commit: str, folder: Path | None) -> Seen:
    """Return what a commit does in a set-up: from an earlier call with this folder, if there was one."""
    if folder is None:
        return see(name, setup)
    code = "".join(Path(module.__file__).read_text() for module in (small, versions))
    key = hashlib.sha256(f"{commit} {name} {setup} {code}".encode()).hexdigest()
    file = folder / f"{key[:16]}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(see(name, setup))))
    return Seen(**json.loads(file.read_text()))


@contextlib.contextmanager
def opened(root: Path | None, inputs: Path, more: Sequence[str] = ()) -> Iterator[Version]:
    """Yield a version whose files are removed at the end."""
    assert root is not None
    with tempfile.TemporaryDirectory() as folder:
        yield Version(root, Path(folder) / "version", inputs, more)


def compare(commit: str, names: Sequence[str], inputs: Path, cache: Path | None, more: Sequence[str]) -> bool:
    """Run both versions in some set-ups; return whether all facts are equal."""
    results = []
    with (
        checked_out(commit) as earlier,
        checked_out(this_version()) as current,
        opened(earlier, inputs) as before,
        opened(current, inputs, more) as now,
    ):
        for name in names:
            try:
                then = cached(before.see, name, SETUPS[name], commit, cache)
                results.append(is_same(name, then, now.see(name, SETUPS[name])))
            except RuntimeError as error:
                print(f"FAILED: {name}: {error}", flush=True)
                results.append(False)
    print(f"{sum(results)} of {len(results)} set-ups are equal")
    return all(results)


def prove(names: Sequence[str], inputs: Path) -> bool:
    """Run this version without and with the faults of some set-ups; return whether the set-ups notice all of them."""
    results = []
    with checked_out(this_version()) as root, opened(root, inputs) as right:
        assert root is not None
        for name in names:
            expected = right.see(name, SETUPS[name])
            for fault in FAULTS[name]:
                noticed = noticed_by(fault, root, inputs, name, expected)
                results.append(noticed != "")
                print(f"{name}: {fault}: {f'noticed by {noticed}' if noticed else 'NOT NOTICED'}", flush=True)
    print(f"{sum(results)} of {len(results)} faults are noticed")
    return all(results)


def noticed_by(fault: Fault, root: Path, inputs: Path, name: str, expected: Seen) -> str:
    """Return the first facts that a fault changes; empty if none, or if a command fails, which proves nothing."""
    with faulty_copy(root, fault) as copy, opened(copy, inputs) as wrong:
        try:
            found = wrong.see(name, SETUPS[name])
        except RuntimeError as error:
            print(error)
            return ""
    different = [fact for fact, lines in expected.facts.items() if lines != found.facts.get(fact)]
    return ", ".join(different[:3])


def main() -> None:
    """Compare, or prove that faults are noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="commit of the earlier version")
    parser.add_argument("--quick", action="store_true", help="only some of the set-ups")
    parser.add_argument("--only", nargs="+", choices=SETUPS, metavar="SET-UP", help="only these set-ups")
    parser.add_argument("--prove", action="store_true", help="check that each set-up notices a fault")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what the earlier version does")
    parser.add_argument("--plain-ray", action="store_true", help="run this version with --plain-ray")
    arguments = parser.parse_args()
    names = arguments.only or [name for name, setup in SETUPS.items() if setup.is_quick or not arguments.quick]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        write_inputs(inputs)
        if arguments.prove:
            is_right = prove([name for name in names if name in FAULTS], inputs)
        else:
            asked = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{arguments.commit}^{{commit}}"]
            commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
            if not commit:
                parser.error(f"commit {arguments.commit} is not in this repository")
            more = ["--plain-ray"] if arguments.plain_ray else []
            is_right = compare(commit, names, inputs, arguments.cache, more)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
