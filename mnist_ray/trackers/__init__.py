"""Trackers follow a run: TensorBoard, Ray's metrics, and the user's own."""

from mnist_ray.trackers.tracker import Ending, Tracker

__all__ = ["Ending", "Tracker"]
