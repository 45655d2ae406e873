"""The seconds of each part of a job."""

from __future__ import annotations

import time
from unittest.mock import Mock

import pytest

from mnist_ray.job.session import Clock
from mnist_ray.training.events import EpochFinished, Validated


def test_a_validation_has_its_seconds_though_its_event_comes_with_that_of_the_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    for _ in range(2):
        now += 5
        for event in (EpochFinished(Mock()), Validated(1, {}, seconds=2.0, total_step=4)):
            clock.note(event)
    assert clock.seconds() == {"training": 6.0, "validation": 4.0, "total": 10.0}
