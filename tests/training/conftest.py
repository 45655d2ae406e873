import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from mnist_ray.training.callback import Callback
from tests.training.ranks import WORLD_SIZES


@pytest.fixture(scope="session")
def ranks() -> Iterator[ProcessPoolExecutor]:
    """The processes of all tests that train on several ranks, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_ray.training.engine", "torch.distributed.fsdp"])
    with ProcessPoolExecutor(max(WORLD_SIZES), mp_context=context) as pool:
        yield pool


class Hooks(Callback):
    """A callback made of functions: it calls them in place of its methods."""

    def __init__(self, **methods: Callable) -> None:
        vars(self).update(methods)
