"""Where the workers' time went: a line at the end of a run, and notes on what has slowed the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mnist_ray.data.data import Split
from mnist_ray.job.job import Job
from mnist_ray.training import stopwatch
from mnist_ray.training.events import Event, Progress, Saved, Started
from mnist_ray.training.stopwatch import PARTS

Seconds = Mapping[str, float]  # of each of PARTS
_MIN_SHOWN = 0.01  # of the time
_MIN_NOTED_S = 5.0  # less is no reason for a note
_MAX_DATA, _MAX_SAVING, _MAX_CALLBACKS = 0.15, 0.05, 0.05  # of the time; more is noted
_MAX_EXCHANGE = 0.4  # of the time that even the slowest worker waits for the others
_MAX_WAIT, _MAX_FACTOR = 0.15, 1.4  # of the time that workers wait for a slower one; its time over theirs


class TimeSpent:
    """The seconds of each worker, since this job has started."""

    def __init__(self) -> None:
        self.of_workers: list[dict[str, float]] = []  # seconds of each of PARTS
        self.hosts: Sequence[str] = ()  # of the workers, in the last attempt

    def add(self, event: Event) -> None:
        """Add an event's seconds."""
        match event:
            case Started():
                self.hosts = event.hosts
            case Progress() | Saved():
                self.of_workers += [dict.fromkeys(PARTS, 0.0) for _ in event.parts[len(self.of_workers) :]]
                for own, seconds in zip(self.of_workers, event.parts, strict=False):  # an elastic run may have fewer
                    for part, more in zip(PARTS, seconds, strict=True):
                        own[part] += more


def means(of_workers: Sequence[Seconds]) -> Seconds:
    """Return the mean seconds of a worker, by part."""
    return {part: statistics.fmean(seconds[part] for seconds in of_workers) for part in PARTS}


def shares_of(of_workers: Sequence[Seconds]) -> str:
    """Return what fraction of the time each part took, the largest first: ``compute 71 %, other workers 18 %``."""
    seconds = means(of_workers)
    total = math.fsum(seconds.values())
    shown = {part: value / total for part, value in seconds.items() if value >= _MIN_SHOWN * total > 0}
    largest_first = sorted(shown.items(), key=lambda item: -item[1])
    return ", ".join(f"{PARTS[part]} {share:.0%}" for part, share in largest_first)


def notes_on(of_workers: Sequence[Seconds], hosts: Sequence[str], job: Job, train: Split) -> list[str]:
    """Return a line for each cause of slow training, with its remedy; none if nothing is clearly wrong."""
    seconds = means(of_workers)
    total = math.fsum(seconds.values())

    def is_large(part_s: float, max_share: float) -> bool:
        return part_s > max(max_share * total, _MIN_NOTED_S)

    def took(part_s: float) -> str:
        return f"took {part_s / total:.0%} of the time ({part_s:.1f} s)"

    notes = []
    data_s, callbacks_s = seconds[stopwatch.DATA], seconds[stopwatch.CALLBACKS]
    saving_s = seconds[stopwatch.CHECKPOINTS] + seconds[stopwatch.STORAGE]
    if is_large(data_s, _MAX_DATA):
        notes.append(f"waiting for data {took(data_s)}: {_data_remedy(data_s, total, job, train)}")
    if len(of_workers) > 1:
        notes += _note_on_workers(of_workers, hosts, total)
    if is_large(saving_s, _MAX_SAVING):
        cause = "the storage is slow" if seconds[stopwatch.STORAGE] > saving_s / 2 else "the state is large"
        num_steps = job.train.total_steps(len(train))
        fewer = f"with --num-steps {num_steps} --validate-every {max(1, num_steps // 10)}, there would be fewer"
        notes.append(f"checkpoints {took(saving_s)}: {cause}, or epochs are short; {fewer}")
    if is_large(callbacks_s, _MAX_CALLBACKS) and (job.callbacks or job.workload.callbacks):
        notes.append(f"callbacks {took(callbacks_s)}; do their work less often")
    return notes


def _data_remedy(data_s: float, total: float, job: Job, train: Split) -> str:
    if train.is_in_blocks:
        return "its storage, Blocks.read or a transform is slower than the training"
    if train.is_stream:
        ahead = "" if job.workers.loader_workers else "--loader-workers 1 reads ahead, and "
        return f"every worker reads the whole stream; {ahead}Blocks are read in parts"
    if job.workers.loader_workers:
        return "use more --loader-workers, or make the Dataset and its transforms faster"
    needed = math.ceil(data_s / max(total - data_s, data_s / 16))  # this many read as fast as the training computes
    return f"with --loader-workers {needed}, other processes would read meanwhile, and save up to {data_s:.0f} s"


def _note_on_workers(of_workers: Sequence[Seconds], hosts: Sequence[str], total: float) -> list[str]:
    """Return a note if all wait for one slow worker, or if the gradients take long even for the slowest."""
    waits = [seconds[stopwatch.WORKERS] for seconds in of_workers]
    slowest = min(range(len(waits)), key=waits.__getitem__)
    others = [number for number in range(len(waits)) if number != slowest]
    wait_s = statistics.fmean(waits[number] for number in others) - waits[slowest]
    own_s = [seconds[stopwatch.DATA] + seconds[stopwatch.COMPUTE] for seconds in of_workers]
    factor = own_s[slowest] / max(statistics.median(own_s[number] for number in others), 1e-9)
    if wait_s > max(_MAX_WAIT * total, _MIN_NOTED_S) and factor > _MAX_FACTOR:
        where = f"worker {slowest} on {hosts[slowest]}" if len(hosts) == len(waits) else f"worker {slowest}"
        slow = f"it is {factor:.1f} times as slow as they are; look for other load on its machine"
        return [f"the other workers wait {wait_s / total:.0%} of the time for {where}: {slow}"]
    if waits[slowest] > max(_MAX_EXCHANGE * total, _MIN_NOTED_S):
        share = f"{waits[slowest] / total:.0%} of the time"
        return [f"all workers wait for gradients {share}: use a larger --batch-size, or fewer --num-workers"]
    return []
