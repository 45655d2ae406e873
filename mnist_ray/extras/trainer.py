"""A trainer without Ray's unneeded actors: each actor is a process that takes time to start and exit.

Without it: a run starts one or two seconds later, and takes up to a second longer to exit.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class Trainer(TorchTrainer):
    """A ``TorchTrainer`` that creates fewer callbacks: two of Ray's start an actor each."""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # there are no Ray Datasets
        if self.backend_config.folder is not None:  # nothing to clean up: a local Ray ends with the job
            unneeded += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, unneeded)]
