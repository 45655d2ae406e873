"""A callback made of functions."""

from collections.abc import Callable

from mnist_ray.training.callback import Callback


class Hooks(Callback):
    """Calls the given functions in place of its methods."""

    def __init__(self, **methods: Callable) -> None:
        vars(self).update(methods)
