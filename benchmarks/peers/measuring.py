"""What the peers need to be measured. The lines that use it are not counted as lines that a user writes."""

from __future__ import annotations

import json
import time


class Clock:
    """Takes the seconds of the epochs."""

    def __init__(self) -> None:
        self._epochs: list[tuple[float, int]] = []  # seconds, and the number of images or steps
        self._started: float | None = None

    def start(self) -> None:
        """Start an epoch."""
        self._started = time.perf_counter()

    def stop(self, number: int) -> None:
        """End an epoch of ``number`` images or steps, if one has started."""
        if self._started is not None:
            self._epochs.append((time.perf_counter() - self._started, number))
        self._started = None

    def report(self, accuracy: float) -> None:
        """Print the images/s and the accuracy on the test set as JSON."""
        seconds, numbers = zip(*self._epochs, strict=True)
        print(json.dumps({"images_per_s": sum(numbers) / sum(seconds), "accuracy": accuracy}))

    def report_steps(self, loss: float) -> None:
        """Print the steps/s of the epochs after the first, and the loss on the test set, as JSON."""
        seconds, numbers = zip(*self._epochs[1:], strict=True)
        print(json.dumps({"steps_per_s": sum(numbers) / sum(seconds), "loss": loss}))
