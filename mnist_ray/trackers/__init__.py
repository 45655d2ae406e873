"""Trackers follow a run: TensorBoard, and the user's own."""

from mnist_ray.trackers.tracker import Ending, Tracker

__all__ = ["Ending", "Tracker"]
