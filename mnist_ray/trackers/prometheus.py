"""Reports a run in Ray's metrics, which every node serves to Prometheus. Ray prefixes their names with ``ray_``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from mnist_ray.storage import RunFolder
from mnist_ray.trackers.tracker import Tracker
from mnist_ray.training.events import Event, Progress, Started, Validated
from mnist_ray.workload.base import Workload


class RayMetrics(Tracker):
    """A run's current values as gauges, which disappear when this process ends."""

    def __init__(self, run: RunFolder, workload: Workload, settings: Mapping[str, Any]) -> None:
        super().__init__(run, workload, settings)

        def gauge(name: str, description: str, *tag_keys: str) -> Gauge:
            created = Gauge(f"mnist_ray_{name}", description, tag_keys=("run", *tag_keys))
            created.set_default_tags({"run": run.name})
            return created

        self._workers = gauge("workers", "Workers that train")
        self._epochs = gauge("epochs", "Epochs trained, including the fraction of the current epoch")
        self._rate = gauge("examples_per_second", "Examples per second over all workers, in the current epoch")
        self._learning_rate = gauge("learning_rate", "Learning rate of the last step")
        self._train = gauge("train", "Training loss and metrics since the last report", "metric")
        self._val = gauge("val", "Validation loss and metrics", "metric")
        self._num_workers = 0
        self._validated: Mapping[str, float] = {}

    def log(self, event: Event) -> None:
        """Set the gauges. Each progress event sets all of them, since Ray drops gauges that are not set again."""
        match event:
            case Started():
                self._num_workers = event.num_workers
            case Validated():
                self._validated = event.values
                _set(self._val, event.values)
            case Progress():
                self._workers.set(self._num_workers)
                self._epochs.set(event.epoch - 1 + event.step / event.num_steps)
                self._rate.set(event.examples_per_s)
                self._learning_rate.set(event.learning_rate)
                _set(self._train, event.window)
                _set(self._val, self._validated)


def _set(gauge: Gauge, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.isnan(value):
            gauge.set(value, {"metric": name})
