"""MNIST with slow parts, for slow.py. What a pause took is added to a file of the folder SLOWED."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mnist_ray.mnist import problem
from mnist_ray.parallel.group import Group
from mnist_ray.storage import RunFolder
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import TrainingState
from mnist_ray.workload import Arrays, Data, setting


class Pauses:
    """Sleeps, and notes what that took."""

    def __init__(self) -> None:
        self._noted_s = 0.0

    @contextlib.contextmanager
    def one(self, seconds: float) -> Iterator[None]:
        """Sleep, and note what that and the block took."""
        start = time.perf_counter()
        if seconds:
            time.sleep(seconds)
        yield
        self._noted_s += time.perf_counter() - start
        if self._noted_s > 0.05:  # a file for each example would be slow itself
            with (Path(os.environ["SLOWED"]) / str(os.getpid())).open("a") as file:
                file.write(f"{self._noted_s}\n")
            self._noted_s = 0.0


class Examples(Dataset):
    """Arrays, of which each example takes a moment to read."""

    def __init__(self, arrays: Arrays, read_s: float) -> None:
        self._arrays, self._read_s, self._pauses = arrays, read_s, Pauses()

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        with self._pauses.one(self._read_s):
            inputs, target = self._arrays[place]
            return inputs, int(target)


@dataclass(frozen=True, kw_only=True)
class Settings(problem.Settings):
    """What is slow."""

    read_ms: float = setting(0.0, "milliseconds to read a training example")


class Slowed(problem.MNIST):
    """MNIST, with training examples that may be slow to read."""

    Settings = Settings

    def load_data(self) -> Data:
        """Return MNIST."""
        data = super().load_data()
        assert isinstance(data.train, Arrays)
        train, validation = (Arrays(*data.train[part]) for part in (slice(0, 6000), slice(6000, 7000)))
        return Data(
            Examples(train, self.settings.read_ms / 1000),
            data.test,
            validation,
            metadata={"class_names": list("0123456789")},
        )


class SlowCallback(Callback):
    """Takes a moment after each step."""

    def __init__(self) -> None:
        self._pauses = Pauses()

    def on_step(self, state: TrainingState) -> None:
        """Pause."""
        with self._pauses.one(0.005):
            pass


class SlowStorage(Callback):
    """Lets the storage take so many bytes a second."""

    bytes_per_s = 2e5

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Slow down what this process writes from now on."""
        write_files, pauses = RunFolder.write_files, Pauses()

        def slowly(folder: RunFolder, contents: Any) -> None:
            held = {name: list(parts) for name, parts in contents.items()}
            size = sum(memoryview(part).nbytes for parts in held.values() for part in parts)
            with pauses.one(size / self.bytes_per_s):
                write_files(folder, held)

        RunFolder.write_files = slowly  # type: ignore[method-assign,assignment]


class Storage20(SlowStorage):
    """20 MB/s."""

    bytes_per_s = 2e7
