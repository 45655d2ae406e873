"""Measure what examples/audit.py finds in MNIST with 2 % of the labels changed and with planted duplicates.

    python benchmarks/auditing.py    # 8 minutes on two cores

Trains a cross-validation of five folds, with the default recipe. Prints the precision and the recall of the first 1,200
findings, beside those of the 1,200 examples with the largest loss; and how many of the 100 near duplicates (images of
the training set with noise: 50 in the training set, 50 in the test set) are found, and how many others.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from before import ROOT

from mnist_ray import load_run

WRONG = '''
import numpy as np
from mnist_ray.mnist import MNIST
from mnist_ray.workload import Arrays, Data

class Wrong(MNIST):
    """MNIST with 1,200 wrong labels and 100 near duplicates."""

    def load_data(self):
        random, data = np.random.default_rng(0), super().load_data()
        (inputs, targets), (test_inputs, test_targets) = data.train[:], data.test[:]
        copied = random.choice(60_000, 100, replace=False)
        noise = random.normal(0, 2, inputs[copied].shape)
        copies = np.clip(inputs[copied] + noise, 0, 255).astype(np.uint8)
        flipped, by = random.choice(60_000, 1_200, replace=False), random.integers(1, 10, 1_200)
        targets = targets.copy()
        targets[flipped] = (targets[flipped] + by) % 10
        train = np.concatenate([inputs, copies[:50]]), np.concatenate([targets, targets[copied[:50]]])
        test = np.concatenate([test_inputs, copies[50:]]), np.concatenate([test_targets, targets[copied[50:]]])
        self.flipped, self.copied = flipped, copied
        return Data(Arrays(*train), Arrays(*test))
'''


def main() -> None:
    """Train, audit, compare."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "wrong.py"
        file.write_text(WRONG)
        storage = str(Path(name) / "runs")
        flags = ["--workload", str(file), "--folds", "5", "--storage-path", storage, "--run-name", "folds"]
        subprocess.run([sys.executable, str(ROOT / "jobs" / "train.py"), *flags], check=True)
        run = load_run("folds", storage_path=storage)
        data = run.workload.load_data()
        found = runpy.run_path(str(ROOT / "examples" / "audit.py"))["find_all"](run, data.train, data.test)
        flipped, copied = run.workload.flipped, run.workload.copied  # type: ignore[attr-defined]
        columns = run.predictions
        labels = [finding.place for finding in found if finding.kind == "label"]
        by_loss = columns["index"][np.argsort(-columns["loss"])].tolist()
        for title, places in (("audit", labels), ("largest loss", by_loss)):
            first = places[:1_200]
            hits = len({*first} & {*flipped.tolist()})
            print(f"{title}: precision {hits / len(first):.1%}, recall {hits / 1_200:.1%}; {len(places):,} in all")
        planted = {("duplicate", 60_000 + number) for number in range(50)}
        planted |= {("in test", int(place)) for place in copied[50:]}
        duplicates = {(finding.kind, finding.place) for finding in found if finding.kind != "label"}
        print(f"duplicates: {len(duplicates & planted)} of 100 planted, {len(duplicates - planted)} others")


if __name__ == "__main__":
    main()
