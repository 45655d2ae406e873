"""Measure the test accuracy of both recipes on MNIST, over five seeds.

    python benchmarks/accuracy.py      # about 5 minutes on two cores

Guards the accuracy that the README states for the default recipe: a mean of five seeds, none of them picked.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"


def test_accuracy(recipe: str, seed: int, storage: str) -> float:
    """Run the training job; return its test accuracy."""
    name = f"{recipe}-{seed}"
    flags = ["--recipe", recipe, "--seed", str(seed), "--storage-path", storage, "--run-name", name, "--quiet"]
    subprocess.run([sys.executable, str(TRAIN), *flags], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((Path(storage) / name / "result.json").read_text())["test_accuracy"])


def main() -> None:
    """Train every recipe with every seed; print a line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["default", "notebook"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        for recipe in args.recipes:
            accuracies = [test_accuracy(recipe, seed, storage) for seed in args.seeds]
            each = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
            print(f"{recipe:<9} mean {statistics.mean(accuracies):.2%} of seeds {args.seeds}: {each}", flush=True)


if __name__ == "__main__":
    main()
