"""Runs in Weights & Biases. With the variable WANDB_MODE=offline nothing leaves this machine."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import wandb
from PIL import Image

from mnist_ray.errors import masked
from mnist_ray.storage import RunFolder
from mnist_ray.trackers.tracker import Ending, Tracker
from mnist_ray.training.events import Event
from mnist_ray.workload.base import Workload


class WandB(Tracker):
    """A run of a project; a resumed run goes on in the one that it has there."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any], project: str) -> None:
        super().__init__(run, workload, settings)
        uri = masked(run.uri)
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=hashlib.sha256(uri.encode()).hexdigest()[:16],
            resume="allow",
            config={**settings, "run": uri},
            dir=run.path if "://" not in run.uri else tempfile.mkdtemp(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for axis in ("step", "epoch"):
            self._run.define_metric(f"{axis}/*", step_metric=axis)

    def log(self, event: Event) -> None:
        """Write an event's values, each by its step or epoch."""
        rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        for name, value, at in self.scalars(event):
            rows[name.partition("/")[0], at][name] = value
        for (axis, at), row in rows.items():
            self._run.log({**row, axis: at})

    def close(self, ending: Ending) -> None:
        """Write the test's values and the pictures."""
        self._run.summary.update(self.final(ending))
        opened = {name: Image.open(io.BytesIO(png)) for name, png in ending.pictures.items()}
        self._run.log({f"pictures/{name}": wandb.Image(image) for name, image in opened.items()})
        self._run.finish(exit_code=int(ending.result is None))
