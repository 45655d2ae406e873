"""MNIST with the notebook's network."""

from mnist_ray.workload.mnist.workload import MNIST

__all__ = ["MNIST"]
