"""Code of the user's in the training loop, for what no setting covers: ``--callback FILE.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnist_ray.workload.user_code import UserClass

if TYPE_CHECKING:
    from mnist_ray.training.events import Progress
    from mnist_ray.training.state import Group, TrainingState


class Callback(UserClass):
    """Is called on every rank, at the same steps; subclasses override what they need.

    Each worker makes one, without arguments, whenever it starts. What a resumed run must know belongs into
    ``state_dict``. ``state.model``, ``state.optimizer`` and ``state.scheduler`` may be changed, on all ranks alike.
    """

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Training begins, or goes on from a checkpoint, which is in ``state`` already."""

    def on_gradients(self, state: TrainingState) -> None:
        """A step's gradients, of the mean loss of the global batch, are in the model; they are not clipped yet."""

    def on_step(self, state: TrainingState) -> None:
        """The optimizer has made a step; ``state.step`` counts those of the epoch."""

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """About half a second has passed; ``progress`` has the figures over all ranks."""

    def on_epoch(self, state: TrainingState, progress: Progress) -> None:
        """An epoch is over, and its checkpoint about to be saved. ``state.ends = True`` ends the training with it."""

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """A checkpoint is to be saved, at an epoch's end (``state.step`` is 0 then) or within one."""

    def wants_checkpoint(self) -> bool:
        """Return whether to save one now, besides the regular times; asked after ``on_progress``, the same on all."""
        return False

    def wants_stop(self) -> bool:
        """Return whether to save one now and end the training; asked before ``on_progress``, rank 0's answer counts."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold, as JSON."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take what a checkpoint holds."""
