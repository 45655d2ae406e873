"""MNIST with the notebook's network."""

from mnist_ray.mnist.problem import MNIST

__all__ = ["MNIST"]
