"""The sides of a comparison: runs and their members, as their files describe them. No code of a run is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_ray.errors import UsageError
from mnist_ray.report.columns import COLUMNS_FILE, read_columns
from mnist_ray.report.run_files import number_of, settings_of
from mnist_ray.storage import ORIGIN_FILE, RESULT_FILE, RunFolder
from mnist_ray.tools.differences import Difference, as_dict, first_of, pairs_differ
from mnist_ray.training.metrics import WEIGHT
from mnist_ray.workload.figures import RATE

SECONDS = "seconds"


@dataclass(frozen=True)
class Member:
    """A trained and tested model: a run, or one of a run's seeds and folds."""

    name: str  # of its folder within the run, with its seed and fold; "" if it is the run
    folder: RunFolder
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]  # of predictions.parquet, (N,) each, by rising index

    @classmethod
    def read(cls, name: str, folder: RunFolder) -> Member:
        """Read a run's files. Raises UsageError if it is no run, or unfinished, and JobError."""
        config, result = settings_of(folder), folder.read_json(RESULT_FILE)
        if result is None:
            raise UsageError(f"run {folder.uri} is not finished: it has no {RESULT_FILE} yet")
        found = read_columns(folder)
        columns = {name: values for name, values in found.items() if values.ndim == 1 and values.dtype.kind in "biuf"}
        for column in {"index", "loss", WEIGHT} & found.keys():
            if column not in columns or (column == "index" and columns[column].dtype.kind not in "iu"):
                raise folder.damaged(COLUMNS_FILE, f"its column {column} does not have a number for each example")
        order = np.argsort(columns.get("index", np.arange(0)))
        flat = {name: values[order] for name, values in columns.items()}
        return cls(name, folder, config, folder.read_json(ORIGIN_FILE) or {}, result, flat)

    @property
    def has_classes(self) -> bool:
        """Whether each answer is right or wrong, and all examples count alike."""
        kinds = [self.columns[name].dtype.kind for name in ("label", "prediction") if name in self.columns]
        return len(kinds) == 2 and {*kinds} <= {*"biu"} and WEIGHT not in self.columns

    @property
    def losses(self) -> np.ndarray:
        """The loss of each example, (N,); their mean is the reported one, also if examples have weights."""
        losses = self.columns["loss"].astype(np.float64)
        weights = self.columns.get(WEIGHT, np.ones(len(losses)))
        # A ratio of sums is nearly a mean of these: an example that only has more weight than others adds nothing.
        return (losses - weights * (losses.sum() / weights.sum())) / weights.mean() + losses.sum() / weights.sum()

    @property
    def scores(self) -> np.ndarray:
        """What is compared, (N,), higher is better: 100 points for a right answer, or the negative loss."""
        return 100.0 * (self.columns["label"] == self.columns["prediction"]) if self.has_classes else -self.losses


@dataclass(frozen=True)
class Side:
    """A run that is compared, with a letter that stands for it."""

    letter: str
    run: RunFolder
    members: Sequence[Member]

    @classmethod
    def read(cls, letter: str, run: RunFolder) -> Side:
        """Read a run and its members. Raises UsageError and JobError."""
        names = (run.read_json(RESULT_FILE) or {}).get("members") or [""]
        return cls(letter, run, [Member.read(name, run.inside(name) if name else run) for name in names])

    @property
    def has_folds(self) -> bool:
        """Whether it is a cross-validation, whose members are tested on different examples."""
        return "_fold-" in self.members[0].name

    @property
    def metrics(self) -> list[str]:
        """The names of the test's figures."""
        figures = {name: value for name, value in self.members[0].result.items() if name.startswith("test_")}
        return [name[len("test_") :] for name, value in figures.items() if not isinstance(value, (list, dict))]

    @property
    def forms(self) -> dict[str, str]:
        """How to show each figure in result.json that is compared: those of the test, the speed, and the seconds."""
        known = self.members[0].result.get("formats", {})
        tested = {f"test_{name}": known.get(f"test_{name}", "number") for name in self.metrics}
        return {**tested, RATE: ",.0f", SECONDS: ".1f"}

    def values(self, figure: str) -> list[float]:
        """Return a figure of each member; NaN if it is unknown. Seconds are those until the test."""
        results = [{**member.result, SECONDS: _seconds(member.result)} for member in self.members]
        return [number_of(result.get(figure)) for result in results]

    def by_example(self, values: Callable[[Member], np.ndarray]) -> np.ndarray:
        """Return the mean over the members of a value of each test example, by rising index."""
        _, places, counts = np.unique(self.indices, return_inverse=True, return_counts=True)
        return np.bincount(places, np.concatenate([values(member) for member in self.members])) / counts

    @property
    def indices(self) -> np.ndarray:
        """The indices of the members' test examples, one member after the other."""
        return np.concatenate([member.columns["index"] for member in self.members])


def differences(first: Side, second: Side) -> dict[str, Difference]:
    """Return what differs between the sides' first members; as seed and fold, a side has those of all members."""
    words = (f"in {first.letter}", f"in {second.letter}")
    origins = [side.members[0].origin for side in (first, second)]
    data, versions = ([as_dict(origin.get(name)) for origin in origins] for name in ("data", "versions"))
    codes = [_code(origin) for origin in origins]
    if all(repositories := [_repository(origin) for origin in origins]):  # a submitted job does not know its own
        codes = [code | repository for code, repository in zip(codes, repositories, strict=True)]
    return {
        "settings": pairs_differ(_settings(first), _settings(second), words=words),
        "data": first_of(_differing(*data)) if all(data) else None,
        "code": first_of(_differing(*codes)) if all(any(code.values()) for code in codes) else None,
        "versions": pairs_differ(versions[0], versions[1], words=words) if all(versions) else None,
    }


def _seconds(result: Mapping[str, Any]) -> Any:
    return None if result.get("is_resumed") else result[SECONDS].get("total")  # since the last start only


def _settings(side: Side) -> dict[str, Any]:
    """Return the settings that affect a run, with the seeds and folds of all members."""
    first = side.members[0]
    unused = first.origin.get("unused_settings", ())
    settings = {name: value for name, value in first.config.items() if name not in unused}
    for name in {"seed", "fold"} & settings.keys():
        values = dict.fromkeys(member.config.get(name) for member in side.members)
        settings[name] = " ".join(str(value) for value in values if value is not None) or None
    return settings


def _code(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of the code that origin.json has, by what they are of."""
    code = as_dict(origin.get("code"))
    return {
        "the workload's file": origin.get("workload_sha256"),
        **as_dict(code.get("modules")),
        "the callbacks": code.get("callbacks"),
        "mnist_ray itself": code.get("package_sha256"),
    }


def _repository(origin: Mapping[str, Any]) -> dict[str, Any]:
    if not (repository := as_dict(as_dict(origin.get("code")).get("repository"))):
        return {}
    return {"the commit": repository.get("commit"), "uncommitted changes": repository.get("changes_sha256")}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]
