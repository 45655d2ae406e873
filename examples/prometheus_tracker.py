"""Reports a run in Ray's metrics, which every node of a cluster serves to Prometheus:

python jobs/train.py --tracker examples/prometheus_tracker.py

Ray prefixes the metrics' names with `ray_`; deploy/grafana.json is a Grafana dashboard that shows them.
"""

import math

from ray.util.metrics import Gauge

from mnist_ray.trackers import Tracker
from mnist_ray.training.events import Progress, Started, Validated


class RayMetrics(Tracker):
    """A run's current values as gauges, which disappear when this process exits."""

    def __init__(self, run, workload, settings):
        super().__init__(run, workload, settings)

        def gauge(name, description, *tag_keys):
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
        self._validated = {}

    def log(self, event):
        """Set the gauges. Each progress event sets all of them, since Ray drops gauges that are not set again."""
        match event:
            case Started():
                self._num_workers = event.num_workers
            case Validated():
                self._validated = event.values
                set_all(self._val, event.values)
            case Progress():
                self._workers.set(self._num_workers)
                self._epochs.set(event.epoch - 1 + event.step / event.epoch_steps)
                self._rate.set(event.examples_per_s)
                self._learning_rate.set(event.learning_rate)
                set_all(self._train, event.window)
                set_all(self._val, self._validated)


def set_all(gauge, values):
    """Set a gauge for each metric that has a value."""
    for name, value in values.items():
        if not math.isnan(value):
            gauge.set(value, {"metric": name})
