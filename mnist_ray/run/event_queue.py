"""The queue through which workers report events to the driver, and the driver stops workers."""

from __future__ import annotations

from typing import Any

import ray

from mnist_ray.cluster.nodes import this_node
from mnist_ray.training.events import Event


class EventQueue:
    """Keeps events until the driver takes them. It is an actor, so neither side waits for the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_stop_requested = False

    def put(self, event: Event) -> bool:
        """Keep an event; return whether the training must stop."""
        self._events.append(event)
        return self._is_stop_requested

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """From now on, let ``put`` return that training must stop."""
        self._is_stop_requested = True


def open_event_queue() -> Any:
    """Create an event queue on this node, so that it survives the loss of other nodes; return its actor."""
    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(EventQueue).remote()
