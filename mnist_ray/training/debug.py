"""Debugging aids: a profiler, and the operation that produced the first NaN gradient."""

from __future__ import annotations

import contextlib
import gzip
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from mnist_ray.errors import first_line
from mnist_ray.settings import json_lines
from mnist_ray.storage import OPERATORS_FILE, TRACE_FILE, RunFolder
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import CodeFailedError, Group, TrainingState

_WARM_UP_STEPS = 10
_NUM_OPERATORS = 10


class Profiler(Callback):
    """Profiles some steps of the first worker, after a few that warm up."""

    def __init__(self, num_steps: int, run: RunFolder) -> None:
        self._num_steps = num_steps
        self._run = run
        self._steps_left = -1
        self._profile: profile | None = None

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Begin to count."""
        if group.rank == 0 and not self._run.exists(OPERATORS_FILE):
            self._steps_left = _WARM_UP_STEPS + self._num_steps

    def on_step(self, state: TrainingState) -> None:
        """Begin; or end, and write the profile."""
        self._steps_left -= 1
        if self._steps_left == self._num_steps:
            self._profile = profile()
            self._profile.start()
        elif self._steps_left == 0 and self._profile is not None:
            self._profile.stop()
            self._write(self._profile)
            self._profile = None

    def _write(self, seen: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(trace))
            self._run.write_bytes(TRACE_FILE, gzip.compress(trace.read_bytes()))
        self._run.write_text(OPERATORS_FILE, json_lines({"steps": self._num_steps, "operators": _most_expensive(seen)}))


def _most_expensive(seen: profile) -> list[dict[str, Any]]:
    """Return the operators that took the most time themselves: milliseconds and calls of all steps."""
    events = seen.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    micros = {event.key: event.self_device_time_total if on_device else event.self_cpu_time_total for event in events}
    total = sum(micros.values()) or 1.0
    return [
        {"operator": event.key, "calls": event.count, "ms": micros[event.key] / 1e3, "part": micros[event.key] / total}
        for event in sorted(events, key=lambda event: -micros[event.key])[:_NUM_OPERATORS]
    ]


@contextlib.contextmanager
def anomalies_found(is_wanted: bool, *folders: Path) -> Iterator[None]:
    """Let PyTorch find the operation whose gradient is NaN first, if wanted. Raises CodeFailedError with its place.

    That is the last one in ``folders``, if it comes through these.
    """
    if not is_wanted:
        yield
        return
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        try:
            yield
        except RuntimeError as error:
            if "nan values" not in str(error) or not caught:
                raise
            raise CodeFailedError(f"{first_line(error)} {_called(str(caught[-1].message), folders)}") from error


def _called(forward: str, folders: Sequence[Path]) -> str:
    """Return the line that called an operation, from the traceback that PyTorch has kept."""
    places = [(Path(file), line) for file, line in re.findall(r'File "(.+)", line (\d+)', forward)]
    own = [place for place in places if any(folder in place[0].parents for folder in folders)]
    file, line = (own or places)[-1]
    return f"It is of what was called here: {file.name}, line {line}"
