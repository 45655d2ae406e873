"""A callback made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mnist_ray.training.callback import Callback
from mnist_ray.training.events import Progress
from mnist_ray.training.state import TrainingState


class Hooks(Callback):
    """Calls the given functions."""

    def __init__(
        self,
        progress: Callable[[Progress], Any] = lambda progress: None,
        checkpoint: Callable[[TrainingState, Progress], Any] = lambda state, progress: None,
        wants_checkpoint: Callable[[], bool] = lambda: False,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._progress, self._checkpoint = progress, checkpoint
        self._wants_checkpoint, self._wants_stop = wants_checkpoint, wants_stop

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        self._progress(progress)

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        self._checkpoint(state, progress)

    def wants_checkpoint(self) -> bool:
        return self._wants_checkpoint()

    def wants_stop(self) -> bool:
        return self._wants_stop()
