"""Tells the driver that workers are replaced because their node is preempted: no exception reports it.

Without it: the workers are replaced nevertheless, but no line reports why.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState

from mnist_ray.training.events import WorkersLost


class PreemptionCallback(ControllerCallback):
    """A callback that Ray Train's controller calls in its own process."""

    def __init__(self, event_queue: Any) -> None:
        self._event_queue = event_queue

    def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
        """Report workers that are replaced because their node will be preempted."""
        if isinstance(previous_state, PreemptingState) and isinstance(current_state, RestartingState):
            self._event_queue.put.remote(WorkersLost("a worker's node was preempted", is_failure=False))
