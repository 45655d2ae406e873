"""Logs runs to Weights & Biases: `pip install wandb`, then

WANDB_PROJECT=digits python jobs/train.py --tracker examples/wandb_tracker.py

With WANDB_MODE=offline nothing leaves this machine; `wandb sync` in the run's folder uploads the run later.
"""

import hashlib
import io
import os
import tempfile
from collections import defaultdict

import wandb
from PIL import Image
from wandb.sdk.data_types._private import MEDIA_TMP

from mnist_ray.text import masked
from mnist_ray.trackers import Tracker


class WandB(Tracker):
    """A run in the project; a resumed run continues the earlier one."""

    def __init__(self, run, workload, settings):
        super().__init__(run, workload, settings)
        uri = masked(run.uri)
        self.wandb_run = wandb.init(
            name=run.name,
            id=hashlib.sha256(uri.encode()).hexdigest()[:16],
            resume="allow",
            config={**settings, "run": uri},
            dir=run.path if "://" not in run.uri else tempfile.mkdtemp(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for folder in (MEDIA_TMP, wandb.Artifact._TMP_DIR):  # an earlier run in this process may have removed them
            os.makedirs(folder.name, exist_ok=True)
        for axis in ("step", "epoch"):
            self.wandb_run.define_metric(f"{axis}/*", step_metric=axis)

    def log(self, event):
        """Log an event's values, each at its step or epoch."""
        rows = defaultdict(dict)
        for name, value, at in self.scalars(event):
            rows[name.partition("/")[0], at][name] = value
        for (axis, at), row in rows.items():
            self.wandb_run.log({**row, axis: at})

    def close(self, ending):
        """Log the test metrics and the pictures."""
        self.wandb_run.summary.update(self.final(ending))
        images = {name: Image.open(io.BytesIO(png)) for name, png in ending.pictures.items()}
        self.wandb_run.log({f"pictures/{name}": wandb.Image(image) for name, image in images.items()})
        self.wandb_run.finish(exit_code=int(ending.result is None))
        # The job exits without running Python's exit handlers: flush all data, and remove temporary folders.
        wandb.teardown()
        for folder in (MEDIA_TMP, wandb.Artifact._TMP_DIR):
            folder.cleanup()
