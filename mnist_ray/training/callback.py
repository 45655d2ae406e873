"""Your own code in the training loop, for anything that no setting covers: ``--callback FILE.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnist_ray.workload.user_code import UserClass

if TYPE_CHECKING:
    from mnist_ray.parallel.group import Group
    from mnist_ray.training.events import Progress
    from mnist_ray.training.state import TrainingState


class Callback(UserClass):
    """The base class of your code. Its methods are called on every rank at the same steps; override what you need.

    Each worker creates an instance when it starts. State that a resumed run needs belongs in ``state_dict``. You may
    change ``state.model``, ``state.optimizers`` and ``state.schedulers``, alike on all ranks, freeze or unfreeze
    parameters in any method, and log a number by ``state.log``. ``state.result`` is the model that is validated: with
    ``--ema-decay``, it has the average of the weights, and ``state.model`` the trained ones.
    """

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Training starts. If there is a checkpoint, it is already restored into ``state``."""

    def on_gradients(self, state: TrainingState) -> None:
        """The model holds the gradients of the global batch's mean loss, before clipping."""

    def on_step(self, state: TrainingState) -> None:
        """The optimizer has taken a step; ``state.step`` counts it."""

    def on_progress(self, state: TrainingState, progress: Progress) -> None:
        """About half a second has passed; ``progress`` has the metrics over all ranks."""

    def on_epoch(self, state: TrainingState, progress: Progress) -> None:
        """An epoch is over, and ``state.epoch`` counts it; its checkpoint is not saved yet.

        Set ``state.ends = True`` to make this epoch the last.
        """

    def on_validation(self, state: TrainingState, values: dict[str, float]) -> None:
        """A validation has given these values, by name, the same on all ranks. Its checkpoint is not saved yet."""

    def on_checkpoint(self, state: TrainingState, progress: Progress) -> None:
        """A checkpoint is about to be saved: at an epoch's end (``state.step`` is 0) or within an epoch."""

    def wants_checkpoint(self) -> bool:
        """Return whether to save an extra checkpoint now. Called after ``on_progress``; all ranks must agree."""
        return False

    def wants_stop(self) -> bool:
        """Return whether to save a checkpoint and stop. Called before ``on_progress``; rank 0 decides."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state to keep in checkpoints, as values that JSON can hold."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
