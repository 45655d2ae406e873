import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.training.ranks import WORLD_SIZES


@pytest.fixture(scope="session")
def ranks() -> Iterator[ProcessPoolExecutor]:
    """The processes of all tests that train on several ranks."""
    with ProcessPoolExecutor(max(WORLD_SIZES), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
