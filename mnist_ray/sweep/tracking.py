"""Who follows a sweep's trials."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

from mnist_ray import settings
from mnist_ray.sweep.options import Sweep
from mnist_ray.sweep.progress import SweepConsole
from mnist_ray.sweep.trials import FAILED, TrialRecord, TrialTable
from mnist_ray.trackers import start
from mnist_ray.trackers.base import Ending
from mnist_ray.training.events import TrialEnded


@contextlib.contextmanager
def followed(sweep: Sweep, console: SweepConsole) -> Iterator[Callable[[TrialTable], None]]:
    """Yield what is to be told of the trials whenever they have changed: it shows them, and tells the trackers."""
    job, reported = sweep.job, set[int]()
    warn = functools.partial(console.say, "note")
    trackers = start.start_trials(job.run, job.workload, settings.values_of(sweep.config), job.output, warn)

    def on_change(table: TrialTable) -> None:
        console.show_table(table)
        for record in table.by_point.values():
            if record.is_finished and record.trial not in reported:
                reported.add(record.trial)
                trackers.log(_ended(table, record))

    try:
        yield on_change
    finally:
        trackers.close(Ending(None, {}, None))


def _ended(table: TrialTable, record: TrialRecord) -> TrialEnded:
    outcome = table.outcome(record).items()
    values = {name: value for name, value in outcome if isinstance(value, float) and not math.isnan(value)}
    point = {**record.point.values, "seed": record.point.seed}
    return TrialEnded(record.trial, point, record.state, record.state == FAILED, values)
