"""Points of made-up sweeps."""

from mnist_ray.many.points import Point


def point(batch_size: int, learning_rate: float, seed: int = 0) -> Point:
    return Point((("batch_size", batch_size), ("learning_rate", learning_rate)), seed)
