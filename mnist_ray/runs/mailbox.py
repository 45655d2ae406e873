"""How workers and tasks tell the driver what happens, and the driver asks the workers to stop."""

from __future__ import annotations

from typing import Any

import ray

from mnist_ray.cluster.connection import this_node
from mnist_ray.training.events import Event


class Mailbox:
    """Keeps events until the driver takes them; an actor of its own, so that nobody waits for anybody."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_stop_wanted = False

    def put(self, event: Event) -> bool:
        """Keep an event; return whether the training is to stop."""
        self._events.append(event)
        return self._is_stop_wanted

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events

    def want_stop(self) -> None:
        """Answer from now on that the training is to stop."""
        self._is_stop_wanted = True


def open_mailbox() -> Any:
    """Return a new mailbox's actor; it is beside this process, so that it does not go with another node."""
    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(Mailbox).remote()
