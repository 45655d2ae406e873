"""Debugging aids: a profiler, and the operation that produced the first NaN gradient."""

from __future__ import annotations

import contextlib
import gzip
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import profile

from mnist_ray.errors import first_line
from mnist_ray.storage import OPERATORS_FILE, TRACE_FILE, RunFolder
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import CodeFailedError, Group, TrainingState

_WARM_UP_STEPS = 10
_NUM_OPERATORS = 10


class Profiler(Callback):
    """Profiles some steps of rank 0, after the warm-up."""

    def __init__(self, num_steps: int, run: RunFolder) -> None:
        self._num_steps = num_steps
        self._run = run
        self._steps_left = -1
        self._profile = profile()

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Start to count steps on rank 0, unless the run already has a profile."""
        if group.rank == 0 and not self._run.exists(OPERATORS_FILE):
            self._steps_left = _WARM_UP_STEPS + self._num_steps

    def on_step(self, state: TrainingState) -> None:
        """Start the profile after the warm-up; write it when its steps are done."""
        self._steps_left -= 1
        if self._steps_left == self._num_steps:
            self._profile.start()
        elif self._steps_left == 0:
            self._profile.stop()
            self._write()

    def _write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(trace))
            self._run.write_bytes(TRACE_FILE, gzip.compress(trace.read_bytes()))
        events = self._profile.key_averages()
        device = "device" if any(event.self_device_time_total for event in events) else "cpu"
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=_NUM_OPERATORS)
        self._run.write_text(OPERATORS_FILE, table)


@contextlib.contextmanager
def anomalies_found(is_wanted: bool, *folders: Path) -> Iterator[None]:
    """If wanted, stop at the first operation with a NaN gradient. Raises CodeFailedError, which names a line.

    It is the innermost line of the forward pass that is in ``folders``, else the innermost of all.
    """
    if not is_wanted:
        yield
        return
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except RuntimeError as error:
            forward = str(caught[-1].message) if caught else ""  # PyTorch warns with the traceback of the forward pass
            places = [(Path(file), line) for file, line in re.findall(r'File "(.+)", line (\d+)', forward)]
            if "nan values" not in str(error) or not places:
                raise
            own = [place for place in places if any(folder in place[0].parents for folder in folders)]
            file, line = (own or places)[-1]
            operation = first_line(error).rstrip(".")
            raise CodeFailedError(f"{operation} (called in the forward pass at {file.name}, line {line})") from error
