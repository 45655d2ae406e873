"""Logs runs to Weights & Biases: ``--tracker wandb``, in the project that ``WANDB_PROJECT`` names.

With ``WANDB_MODE=offline`` nothing leaves this machine; ``wandb sync`` in the run's folder uploads the run later.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import wandb
from wandb.sdk.data_types._private import MEDIA_TMP

from mnist_ray.schema import REPORT_FILE
from mnist_ray.storage import RunFolder
from mnist_ray.text import masked
from mnist_ray.trackers import Ending, Tracker
from mnist_ray.training.events import Event
from mnist_ray.workload.base import Workload


class WandB(Tracker):
    """A run in the project; a resumed run continues the earlier one."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
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
        self.wandb_run.define_metric("*", step_metric="step")

    def log(self, event: Event) -> None:
        """Log an event's values, each at its step."""
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, value, step in self.scalars(event):
            rows[step][name] = value
        for step, row in rows.items():
            self.wandb_run.log({**row, "step": step})

    def close(self, ending: Ending) -> None:
        """Log the test metrics, and the report as an artifact."""
        self.wandb_run.summary.update(self.final(ending))
        if (page := self.run.read_text(REPORT_FILE)) is not None:
            report = wandb.Artifact(f"report-{self.wandb_run.id}", "report")
            with report.new_file(REPORT_FILE) as file:
                file.write(page)
            self.wandb_run.log_artifact(report)
        self.wandb_run.finish(exit_code=int(ending.has_failed))
        # The job exits without running Python's exit handlers: flush all data, and remove temporary folders.
        wandb.teardown()
        for folder in (MEDIA_TMP, wandb.Artifact._TMP_DIR):
            folder.cleanup()
