"""The set-ups of ``same.py``: commands that two versions run with the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import small
from pyarrow import parquet as pq

SMALL = Path(small.__file__)
ONE_CPU = ["--cpus-per-worker", "1"]
"""Without it, the number of threads depends on the machine, and bits on the number of threads."""
TABLE = ["--workload", f"{SMALL}:Table"]
ONE_EPOCH = ["--num-epochs", "1"]
MNIST = ["--limit", "0.2", *ONE_EPOCH]
TWO_WORKERS = ["--num-workers", "2", *ONE_CPU]
THREE_WORKERS = ["--num-workers", "3", *ONE_CPU]
IN_PROCESS = ["--num-workers", "0", *ONE_CPU]
FSDP = ["--strategy", "fsdp", *TABLE]
DIES = ["--callback", f"{SMALL}:Dies"]
SWEEP = ["--num-trials", "4", "--max-concurrent-trials", "1", "--num-confirmed", "1", "--limit", "0.1"]
SWEEP += [*ONE_EPOCH, "--num-workers", "1", *ONE_CPU]
INPUTS = "{inputs}"
"""In a command, the folder with the input files."""
PREDICT = ["predict", "--run", "run", "--input", f"{INPUTS}/parts", "--output", "{storage}/predicted"]
PREDICT += ["--column", *small.COLUMNS]


@dataclass(frozen=True)
class Setup:
    """Commands that run one after another, in a storage of their own."""

    commands: Sequence[Sequence[str]]
    killed_at: str = ""
    """A pattern of files in the storage: as soon as there is one, the first of the last two commands is killed."""
    fails: bool = False
    """Whether the first command fails, because ``small.Dies`` kills its worker."""
    has_console: bool = True
    """Whether consoles are compared; not where they depend on the moment of a kill."""
    shares_memory: bool = True
    is_quick: bool = False
    """Whether it is among those of ``--quick``."""


def train(*flags: str, name: str = "run") -> list[str]:
    """Return the words of a training."""
    return ["train", "--run-name", name, *flags]


def resumed(*flags: str, command: str = "train") -> list[str]:
    """Return the words that resume a run or a sweep."""
    return [command, "--run-name", "run", "--resume", *flags]


SETUPS = {
    "fp32": Setup(
        [train("--precision", "fp32", "--limit", "0.2", "--cpus-per-worker", "2"), ["evaluate", "run"]], is_quick=True
    ),
    "bf16": Setup([train("--precision", "bf16", *ONE_CPU, *MNIST)]),
    "2 workers, shared memory": Setup([train(*TWO_WORKERS, *MNIST)]),
    "2 workers, gloo": Setup([train(*TWO_WORKERS, *MNIST)], shares_memory=False),
    "reproducible, 1 worker": Setup([train("--reproducible", *ONE_CPU, *MNIST)]),
    "reproducible, 2 workers": Setup([train("--reproducible", *TWO_WORKERS, *MNIST)]),
    "shapes.py": Setup([train("--workload", "examples/shapes.py", *ONE_EPOCH, "--num-images", "600", *ONE_CPU)]),
    "diabetes.py": Setup([train("--workload", "examples/diabetes.py", *ONE_CPU)]),
    "sgd, EMA, clipping, micro-batches": Setup(
        [
            train(
                *("--optimizer", "sgd", "--learning-rate", "0.05", "--ema-decay", "0.99"),
                *("--clip-grad-norm", "1", "--micro-batch-size", "50", *ONE_CPU, *MNIST),
            )
        ]
    ),
    "sweep": Setup([["tune", "--run-name", "run", *SWEEP]]),
    "killed and resumed": Setup(
        [train("--checkpoint-every", "50", "--precision", "fp32", *ONE_CPU), resumed()],
        killed_at="run/checkpoint_epoch-001*",
        has_console=False,
    ),
    "fsdp, 2 workers": Setup([train(*FSDP, *TWO_WORKERS)]),
    "fsdp, 2 workers killed, resumed by 3": Setup(
        [
            train(*FSDP, *TWO_WORKERS, *DIES, "--max-failures", "0", "--checkpoint-every", "1000"),
            resumed(*THREE_WORKERS),
        ],
        fails=True,
        has_console=False,
        is_quick=True,
    ),
    "fsdp, EMA, 2 workers": Setup([train(*FSDP, *TWO_WORKERS, "--ema-decay", "0.9", "--clip-grad-norm", "1")]),
    "parquet, 2 workers": Setup(
        [train("--workload", f"{SMALL}:Stored", "--table", INPUTS, *TWO_WORKERS)], is_quick=True
    ),
    "dataset with loaders, 2 workers": Setup(
        [train("--workload", f"{SMALL}:Listed", "--loader-workers", "1", *TWO_WORKERS)]
    ),
    "weights, 2 workers": Setup([train("--workload", f"{SMALL}:Weighted", *TWO_WORKERS)]),
    "seeds and folds": Setup([train(*TABLE, *ONE_CPU, "--num-seeds", "2", "--folds", "2")], is_quick=True),
    "reproducible, 1 worker killed, resumed by 2": Setup(
        [
            train(*TABLE, "--reproducible", "--num-workers", "1", *ONE_CPU, *DIES, "--max-failures", "0"),
            resumed(*TWO_WORKERS),
        ],
        fails=True,
        has_console=False,
    ),
    "killed worker": Setup(
        [train(*TABLE, *TWO_WORKERS, *DIES, "--checkpoint-every", "4")], has_console=False, is_quick=True
    ),
    "killed sweep": Setup(
        [["tune", "--run-name", "run", *SWEEP], resumed(command="tune")],
        killed_at="run/*/*/checkpoint*",
        has_console=False,
    ),
    "killed prediction": Setup(
        [train(*TABLE, *IN_PROCESS), PREDICT, PREDICT],
        killed_at="predicted/*.parquet",
        has_console=False,
        is_quick=True,
    ),
    "from a run's weights": Setup(
        [
            train(*TABLE, *IN_PROCESS, name="first"),
            train(*TABLE, *IN_PROCESS, "--init-from", "first", "--seed", "1"),
        ],
        is_quick=True,
    ),
    "two optimizers": Setup(
        [
            train(
                *("--workload", f"{SMALL.with_name('small_gan.py')}", *TWO_WORKERS),
            )
        ]
    ),
}


def write_inputs(folder: Path) -> None:
    """Write the files that the set-ups read: blocks of a table in train/ and test/, and many small files in parts/."""
    _write(folder / "train" / "rows.parquet", small.NUM_TRAIN, 0)
    _write(folder / "test" / "rows.parquet", small.NUM_TEST, 1)
    for number in range(100):
        _write(folder / "parts" / f"{number:03}.parquet", 500, 100 + number)


def _write(file: Path, number: int, seed: int) -> None:
    inputs, targets = small.rows(number, seed)
    columns: dict[str, np.ndarray] = dict(zip(small.COLUMNS, inputs.T, strict=True))
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({**columns, "target": targets}), file, row_group_size=45)
