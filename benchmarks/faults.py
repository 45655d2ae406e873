"""Faults to put into copies of the project: those that the set-ups of ``same.py --prove`` must notice."""

from __future__ import annotations

import compileall
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """A text of a file that is replaced by another one."""

    name: str
    file: str
    """Relative to the root."""
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


@contextlib.contextmanager
def faulty_copy(root: Path, fault: Fault) -> Iterator[Path]:
    """Yield a copy of a project that has a fault. Raises ValueError if its old text is not there exactly once."""
    text = (root / fault.file).read_text(encoding="utf-8")
    if (number := text.count(fault.old)) != 1:
        raise ValueError(f"{fault}: {fault.old!r} is there {number} times, not once; update the table of faults")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "build"))
        (copy / fault.file).write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        compileall.compile_dir(copy, quiet=2)  # else each process would compile
        yield copy


TRAINER, ORDER = "mnist_ray/training/trainer.py", "mnist_ray/data/order.py"
FAULTS = {
    "fsdp, 2 workers": [
        Fault(
            "gradients are halved",
            "mnist_ray/parallel/sharding.py",
            "set_gradient_divide_factor(1.0)",
            "set_gradient_divide_factor(2.0)",
        ),
    ],
    "fsdp, 2 workers killed, resumed by 3": [
        Fault(
            "a rank resumes with another rank's rows",
            "mnist_ray/checkpoints/tensor_files.py",
            "part[max(0, rows.start - start) : max(0, rows.stop - start)]",
            "part[: len(rows.values)]",
        ),
    ],
    "fsdp, EMA, 2 workers": [
        Fault(
            "the average keeps what it should take",
            TRAINER,
            "get_ema_multi_avg_fn(0.0 if is_first else decay)",
            "get_ema_multi_avg_fn(0.0 if is_first else 1 - decay)",
        ),
        Fault("buffers are not averaged", TRAINER, "buffer.copy_(value)", "buffer.copy_(buffer)"),
    ],
    "parquet, 2 workers": [
        Fault("blocks are not permuted", ORDER, "Shuffled(len(sizes), self._key)[:]", "np.arange(len(sizes))"),
        Fault(
            "examples of several blocks are mixed up",
            "mnist_ray/data/readers.py",
            'np.argsort(np.argsort(blocks, kind="stable"))',
            'np.argsort(blocks, kind="stable")',
        ),
    ],
    "dataset with loaders, 2 workers": [
        Fault(
            "each epoch has the same random numbers",
            TRAINER,
            "seed_of(config.seed, pass_number, 0)",
            "seed_of(config.seed, 0, 0)",
        ),
    ],
    "weights, 2 workers": [
        Fault("weights are ignored", ORDER, "np.cumsum(weights, ", "np.cumsum(np.ones(len(weights)), "),
    ],
    "seeds and folds": [
        Fault(
            "folds are not shuffled",
            "mnist_ray/data/splits.py",
            "Shuffled(size, [seed, _FOLD_SEED])[:]",
            "np.arange(size)",
        ),
        Fault(
            "all runs have one seed",
            "mnist_ray/many/table.py",
            '"seed": point.seed, "fold": point.fold, "num_seeds": 1',
            '"seed": self.job.train.seed, "fold": point.fold, "num_seeds": 1',
        ),
    ],
    "reproducible, 1 worker killed, resumed by 2": [
        Fault(
            "dropout is seeded by rank",
            "mnist_ray/training/step.py",
            "self._seed(seed_number)",
            "self._seed(self._group.rank)",
        ),
        Fault(
            "the optimizer is not restored",
            "mnist_ray/checkpoints/checkpoint.py",
            'optimizer.load_state_dict(saved["optimizers"][name])',
            "optimizer.state_dict()",
        ),
    ],
    "killed worker": [
        Fault(
            "a resumed epoch begins with its first batch",
            "mnist_ray/data/sampler.py",
            "range(self.first_step * self.batch_size, ",
            "range(0, ",
        ),
    ],
    "killed sweep": [
        Fault("trials get other seeds", "mnist_ray/many/table.py", 'int(row["seed"])', 'int(row["seed"]) + 7'),
    ],
    "killed prediction": [
        Fault(
            "the last part is skipped after a kill",
            "mnist_ray/predictions/at_scale.py",
            'parts=dict(known["parts"]))',
            'parts=dict([*known["parts"].items()][:-1]))',
        ),
    ],
    "from a run's weights": [
        Fault(
            "a tensor is left out",
            "mnist_ray/checkpoints/find.py",
            "in own.keys() - lacking}, strict=False)",
            "in sorted(own.keys() - lacking)[1:]}, strict=False)",
        ),
    ],
    "two optimizers": [
        Fault("gradients are not summed", "mnist_ray/parallel/gradients.py", "dist.all_reduce(flat)", "flat.clone()"),
        Fault(
            "the first optimizer steps each time",
            "mnist_ray/training/step.py",
            "        return self.optimizers[name]\n",
            "        return next(iter(self.optimizers.values()))\n",
        ),
    ],
}
"""By set-up; each is in code that this set-up uses. If the code has moved, move the text."""
