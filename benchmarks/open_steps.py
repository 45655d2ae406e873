"""Compare open steps on one to three ranks with plain loops of PyTorch in one process.

    python benchmarks/open_steps.py    # a minute on two cores

Guards that optimizers with closures, several optimizers, parameters that some steps do not use, losses over the whole
batch and changed targets take the steps of a plain loop: prints relative differences of the losses at steps 1 and 50.
"""

import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.ranks import WORLD_SIZES, call_on_ranks
from tests.training.test_step import CASES, train_cases, train_plainly


def main() -> None:
    """Train every case, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(WORLD_SIZES), mp_context=context) as pool:
            call_on_ranks(pool, train_cases, Path(name))
        print("| step | " + " | ".join(f"{number} ranks" for number in WORLD_SIZES) + " |")
        print("|---" * (1 + len(WORLD_SIZES)) + "|")
        for case in CASES:
            plain, cells = train_plainly(case), []
            for number in WORLD_SIZES:
                losses = json.loads((Path(name) / f"{case}-{number}.json").read_text())
                first, last = (abs(losses[step] / plain[step] - 1) for step in (0, -1))
                cells.append(f"{first:.0e}, {last:.0e}")
            print(f"| {case} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
