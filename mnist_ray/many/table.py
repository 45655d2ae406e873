"""A job of many runs and the table of its members, which members.csv holds. Imports neither torch nor Ray."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mnist_ray.config import SweepConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job
from mnist_ray.many.points import Configuration, Point, Space, propose
from mnist_ray.report.run_files import FAILED, LOST, RUNNING, csv_text, read_members
from mnist_ray.schema import MEMBERS_FILE, MEMBERS_FOLDER
from mnist_ray.settings import Choice, values_of
from mnist_ray.storage import RunFolder
from mnist_ray.workload.base import Workload
from mnist_ray.workload.figures import RATE


@dataclass
class Member:
    """One run of many; a row of members.csv."""

    number: int  # counted from 1, in the order in which they start
    point: Point
    state: str = RUNNING
    figures: dict[str, float] = field(default_factory=dict)  # of its last report, by column
    reports: dict[float, float] = field(default_factory=dict)  # the monitor by epochs: members are compared by them
    reason: str = ""  # why it has failed or was lost
    is_over: bool = False  # whether the last report was that of its training's end

    @property
    def epochs(self) -> float:
        """The epochs that it has trained; not always a whole number."""
        return self.figures.get("epochs", 0.0)


class Table:
    """The members of a job, by their points. Raises UsageError if a setting is named like another column."""

    def __init__(self, workload: type[Workload], space: Space, members: Iterable[Member] = ()) -> None:
        self.workload, self.space = workload(None), space
        self.by_point = {member.point: member for member in members}
        self.monitor = f"val_{self.workload.monitor.name}"
        validation = [f"val_{metric.name}" for metric in self.workload.all_metrics]
        self.figures = dict.fromkeys(["epochs", self.monitor, *validation, "train_loss", RATE, "train_s"])
        self.columns = ["member", "run", *space.spaces, "seed", "fold", "state", *self.figures, "reports", "reason"]
        if clash := next((name for name in space.spaces if self.columns.count(name) > 1), None):
            raise UsageError(f"{MEMBERS_FILE} has another column {clash}; rename the setting")

    def start(self, point: Point) -> Member:
        """Return the member of a point that starts, or starts again."""
        member = self.by_point.setdefault(point, Member(len(self.by_point) + 1, point))
        member.state, member.reason = RUNNING, ""
        return member

    def value(self, member: Member) -> float:
        """Return a member's monitor on the validation set, in its last report; NaN before the first one."""
        return member.figures.get(self.monitor, math.nan)

    def is_validated(self, member: Member) -> bool:
        """Return whether a member can be compared with others."""
        return not math.isnan(self.value(member)) and member.state not in (FAILED, LOST)

    def report(self, member: Member, told: Mapping[str, Any]) -> None:
        """Set what a member has reported. One that resumes from its checkpoint may report the same epochs again."""
        member.figures |= {name: float(told[name]) for name in self.figures if name in told}
        if self.monitor in told:
            known = {epochs: value for epochs, value in member.reports.items() if epochs < member.epochs}
            epochs, value = (float(f"{number:.9g}") for number in (member.epochs, self.value(member)))  # as in the file
            member.reports = {**known, epochs: value}

    @property
    def members(self) -> list[Member]:
        """The members, in the order in which they started."""
        return [*self.by_point.values()]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of members.csv, one per member."""
        rows = []
        for member in self.members:
            point = member.point
            about = {"member": member.number, "run": point.name, **point.values, "seed": point.seed, "fold": point.fold}
            figures = {**dict.fromkeys(self.figures, math.nan), "epochs": 0.0, **member.figures}
            reports = " ".join(f"{epochs:.9g}:{value:.9g}" for epochs, value in member.reports.items())
            rows.append({**about, "state": member.state, **figures, "reports": reports, "reason": member.reason})
        return rows

    def write(self, run: RunFolder) -> None:
        """Write members.csv. Raises JobError."""
        run.write_text(MEMBERS_FILE, csv_text(self.columns, self.rows))

    def read(self, run: RunFolder) -> None:
        """Add the members in a job's folder. Raises JobError."""
        try:
            members = [self._member(row) for row in read_members(run)]
        except (KeyError, ValueError, TypeError) as error:
            raise run.damaged(MEMBERS_FILE, error) from error
        self.by_point |= {member.point: member for member in members}

    def _member(self, row: Mapping[str, str]) -> Member:
        fold = int(row["fold"]) if row["fold"] else None
        point = Point(self.space.configuration(row), int(row["seed"]), fold)
        figures = {name: float(row.get(name, math.nan)) for name in self.figures}  # the workload may have new metrics
        pairs = (pair.split(":") for pair in row["reports"].split())
        reports = {float(epochs): float(value) for epochs, value in pairs}
        return Member(int(row["member"]), point, row["state"], figures, reports, row["reason"])


@dataclass(frozen=True)
class Many:
    """A job of many runs: the configurations of a sweep, or only one, with each of the seeds and folds."""

    job: Job
    space: Space = Space({}, {}, {})
    config: SweepConfig = SweepConfig(num_trials=1, scheduler="none", num_confirmed=0)
    num_validation: int = 0  # validation examples; 0 until the data are loaded

    @property
    def is_sweep(self) -> bool:
        """Whether several configurations are compared."""
        return bool(self.space.spaces)

    @cached_property
    def configurations(self) -> list[Configuration]:
        """The configurations to try, each once. Raises UsageError if a grid has more than --num-trials."""
        return propose(self.space, self.config, self.job.train.seed)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes to try; for a range, its two ends. Empty if the batch size is not searched."""
        space = self.space.spaces.get("batch_size")
        if space is None:
            return []
        return list(space.options) if isinstance(space, Choice) else [int(space.low), int(space.high)]

    @property
    def values(self) -> dict[str, Any]:
        """The content of config.json."""
        return {**(values_of(self.config) if self.is_sweep else {}), **self.job.values}

    def points(self, configuration: Configuration) -> list[Point]:
        """Return the points of a configuration, seed by seed; those that the race adds have later seeds."""
        config = self.job.train
        seeds = range(config.seed, config.seed + config.num_seeds)
        folds = range(1, config.folds + 1) if config.folds and config.is_folded else [config.fold]
        return [Point(configuration, seed, fold) for seed, fold in itertools.product(seeds, folds)]

    def member(self, point: Point) -> Job:
        """Return the job of a member: a run with the point's values, seed and fold has the same weights alone."""
        job = self.job.with_values({**point.values, "seed": point.seed, "fold": point.fold, "num_seeds": 1})
        run = self.job.run.inside(MEMBERS_FOLDER).inside(point.name)
        return dataclasses.replace(job, run=run, notes=())

    def label_of(self, member: Member) -> str:
        """Return what messages call a member."""
        return f"trial {member.number}" if self.is_sweep else member.point.label

    def table(self) -> Table:
        """Return the table of the members in the job's folder. Raises JobError."""
        table, run = Table(type(self.job.workload), self.space), self.job.run
        table.read(run)
        if not table.by_point and run.exists(MEMBERS_FOLDER):
            raise JobError(f"{run.uri} has {MEMBERS_FOLDER}/, but no {MEMBERS_FILE}; restore it, or start another job")
        return table
