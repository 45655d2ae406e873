"""Who follows a run: TensorBoard, MLflow, Weights & Biases, Ray's metrics, and trackers of users'."""

from mnist_ray.trackers.tracker import Ending, Tracker

__all__ = ["Ending", "Tracker"]
