"""Compares two runs: what differs, their figures, and which is better. Only their files are read, and no code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_ray.output import finite
from mnist_ray.report.intervals import mcnemar, mean_interval, seeds_interval
from mnist_ray.report.run_files import Run, number_of
from mnist_ray.text import count, in_words, redact
from mnist_ray.training.metrics import WEIGHT
from mnist_ray.workload.figures import IN_WORDS, RATE, formatted

_MAX_P = 0.05
_SAME = "the same"


@dataclass(frozen=True)
class Member:
    """A trained and tested run: one of those that are compared, or one of its seeds and folds."""

    run: Run
    columns: Mapping[str, np.ndarray]  # those of predictions.parquet that hold numbers, (N,) each, by rising index

    @classmethod
    def of(cls, run: Run) -> Member:
        """Read a run's files. Raises UsageError if it is no run, or unfinished, and JobError."""
        run.check_tested()
        columns = run.predictions.items()
        numbers = {name: values for name, values in columns if values.ndim == 1 and values.dtype.kind in "biuf"}
        order = np.argsort(numbers.get("index", np.arange(0)))
        return cls(run, {name: values[order] for name, values in numbers.items()})

    @property
    def is_fold(self) -> bool:
        """Whether it is one of a cross-validation, whose members are tested on different examples."""
        return bool(self.run.row.get("fold"))

    @property
    def has_classes(self) -> bool:
        """Whether each answer is right or wrong, and all examples count alike."""
        kinds = [self.columns[name].dtype.kind for name in ("label", "prediction") if name in self.columns]
        return len(kinds) == 2 and {*kinds} <= {*"biu"} and WEIGHT not in self.columns

    @property
    def scores(self) -> np.ndarray:
        """What is compared, (N,), higher is better: 100 points for a right answer, or the negative loss.

        The mean of the losses is the reported one, also if examples have weights.
        """
        if self.has_classes:
            return 100.0 * (self.columns["label"] == self.columns["prediction"])
        losses = self.columns["loss"].astype(np.float64)
        weights = self.columns.get(WEIGHT, np.ones(len(losses)))
        mean = losses.sum() / weights.sum()
        # A ratio of sums is nearly a mean of these: an example that only has more weight than others adds nothing.
        return -((losses - weights * mean) / weights.mean() + mean)


@dataclass(frozen=True)
class Verdict:
    """Whether B is better than A; only a sentence if the two cannot be compared."""

    sentence: str
    method: str = ""  # what decides, and what stays unknown
    gain: float | None = None  # in points of right answers, else in loss; negative if B is worse
    interval: tuple[float, float] | None = None  # of 95 %, of the gain
    is_sure: bool = False  # whether a difference is shown
    won: Sequence[int] = ()  # indices of the examples on which B is better
    lost: Sequence[int] = ()


@dataclass(frozen=True)
class Comparison:
    """Two runs, A and B, side by side. ``print`` shows it as the command does."""

    runs: tuple[Run, Run]
    members: tuple[Sequence[Member], Sequence[Member]]  # the runs themselves, or their seeds and folds
    differences: dict[str, str]  # of settings, data, code and versions, in words
    verdict: Verdict  # on B

    @property
    def forms(self) -> dict[str, str]:
        """How to show each figure in result.json that is compared: those of the evaluation, and the speed."""
        result = self.members[0][0].run.result
        prefix = f"{self.members[0][0].run.evaluated}_"
        figures = [name for name in result if name.startswith(prefix)]
        return {**{name: result.get("formats", {}).get(name, "number") for name in figures}, RATE: ",.0f"}

    def __str__(self) -> str:
        table = [["", "run", "members", *map(in_words, self.forms)]]
        for letter, run, members in zip("AB", self.runs, self.members, strict=True):
            number = count(len(members), "fold" if members[0].is_fold else "seed")
            cells = [_cell(_values(members, name), form) for name, form in self.forms.items()]
            table.append([letter, run.name, number, *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        same = ", ".join(subject for subject, text in self.differences.items() if text == _SAME)
        about = {subject: text for subject, text in self.differences.items() if text != _SAME}
        about |= {_SAME: same, "verdict": self.verdict.sentence, "method": self.verdict.method}
        lines += [f"{label:<10} {text}" for label, text in about.items() if text]
        return "\n".join(map(redact, lines))  # a name in a run's files may hold a line that looks real

    def to_dict(self) -> dict[str, Any]:
        """Return all as values that JSON can hold: of each figure, the values of all members."""
        runs = {
            letter: {"run": run.folder.uri, **{name: _values(members, name) for name in self.forms}}
            for letter, run, members in zip("AB", self.runs, self.members, strict=True)
        }
        return finite({"runs": runs, "differences": self.differences, "verdict": dataclasses.asdict(self.verdict)})


def compare(first: Run, second: Run) -> Comparison:
    """Compare the second run with the first. Raises UsageError and JobError."""
    for run in (first, second):
        run.check_tested()
    members = [[Member.of(member) for member in run.members or [run]] for run in (first, second)]
    return Comparison((first, second), (members[0], members[1]), _differences(*members), _judge(*members))


def _values(members: Sequence[Member], figure: str) -> list[float]:
    return [number_of(member.run.result.get(figure)) for member in members]


def _differences(first: Sequence[Member], second: Sequence[Member]) -> dict[str, str]:
    """Return in words how the settings, data, code and versions of two runs differ."""
    found, others = {}, _recorded(second)
    for subject, one in _recorded(first).items():
        other = others[subject]
        differing = [name for name in {**other, **one} if one.get(name) != other.get(name)]
        if subject in ("settings", "versions"):
            differing = [f"{name} {one.get(name)} in A, {other.get(name)} in B" for name in differing]
        else:  # digests, which tell a person nothing; one that only one run knows is no difference
            differing = [name for name in differing if one.get(name) and other.get(name)]
        found[subject] = ", ".join(differing) or _SAME
        if not any(one.values()) or not any(other.values()):
            found[subject] = "unknown: A or B has no record of it"
    return found


def _recorded(members: Sequence[Member]) -> dict[str, dict[str, Any]]:
    """Return the values that are compared, by subject: those of the first member, but the seeds and folds of all."""
    config, origin = dict(members[0].run.config), members[0].run.origin
    for name in {"seed", "fold"} & config.keys():
        config[name] = " ".join(dict.fromkeys(str(member.run.config.get(name)) for member in members))
    repository = origin.get("repository") or {}  # a submitted job does not know its own
    return {
        "settings": {name: config[name] for name in config if name not in origin.get("unused_settings", ())},
        "data": origin.get("data") or {},
        "code": {
            "the workload's file": origin.get("workload_sha256"),
            "the commit": repository.get("commit"),
            "uncommitted changes": repository and (repository.get("changes_sha256") or "none"),
            "mnist_ray itself": origin.get("git_commit"),
        },
        "versions": origin.get("versions") or {},
    }


def _cell(values: Sequence[float], form: str) -> str:
    mean = formatted(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {formatted(float(np.std(values, ddof=1)), form)}"


def _judge(first: Sequence[Member], second: Sequence[Member]) -> Verdict:
    """Compare the members of B, the second run, with those of A, example by example."""
    if reason := _why_not(first, second):
        return Verdict(f"A and B cannot be compared by example: {reason}")
    has_classes, before, after = first[0].has_classes, _by_example(first), _by_example(second)
    indices, changes = np.unique(_indices(first)), after - before
    if has_classes:  # most members of the winner have the example right, and at most half of the other's
        changes = (after > 50).astype(int) - (before > 50)
    won, lost = indices[changes > 0].tolist(), indices[changes < 0].tolist()

    gains, p = (after - before).tolist(), None
    alone = " and ".join(letter for letter, members in (("A", first), ("B", second)) if len(members) == 1)
    examples = f"{IN_WORDS[first[0].run.evaluated]} examples"
    unknown = f"the spread between seeds of {alone} is unknown: train with --num-seeds 6"
    if first[0].is_fold:
        num_tested = len(_indices(first)) / len(first)
        gains = [float(two.scores.mean() - one.scores.mean()) for one, two in zip(first, second, strict=True)]
        low, high = mean_interval(gains, overlap=num_tested / (len(indices) - num_tested))
        method = f"{len(gains)} folds, whose overlap in training is counted"
    elif not alone:
        low, high = seeds_interval(*(np.stack([member.scores for member in members]) for members in (first, second)))
        method = f"Welch's interval over {len(first)} and {len(second)} seeds, and the spread over the {examples}"
    else:
        low, high = mean_interval(gains)
        method = f"Student's interval over the {examples}; {unknown}"
    if has_classes and len(first) == len(second) == 1:
        p = mcnemar(len(won), len(lost))
        method = f"McNemar's exact test, p = {p:.2g}; {unknown}"
    if first[0].run.evaluated == "val":
        method += "; the validation examples also chose each checkpoint"
    gain = float(np.mean(gains))
    is_sure = (low > 0 or high < 0) if p is None else p < _MAX_P
    sentence = _sentence(gain, low, high, is_sure=is_sure, unit="points" if has_classes else "in loss")
    if has_classes:
        changed = count(len(won) + len(lost), "example")
        sentence += f"; {changed} changed: {len(won):,} won, {len(lost):,} lost"
    return Verdict(sentence, method, gain, (low, high), is_sure, won, lost)


def _sentence(gain: float, low: float, high: float, *, is_sure: bool, unit: str) -> str:
    sign, form = math.copysign(1, gain), ".2f" if unit == "points" else "number"
    size, *ends = (formatted(value, form) for value in (abs(gain), *sorted((sign * low, sign * high))))
    words = ("better than", "worse than") if is_sure else ("ahead of", "behind")
    said = "" if is_sure else "no significant difference: "
    return f"{said}B is {words[sign < 0]} A by {size} {unit} (95 %: {' to '.join(ends)})"


def _why_not(first: Sequence[Member], second: Sequence[Member]) -> str:
    """Return why A and B cannot be compared example by example; empty if they can."""
    for letter, members in (("A", first), ("B", second)):
        if not all({"index", "loss"} <= member.columns.keys() for member in members):
            return f"{letter} has no predictions.parquet with the loss of each example"
    has_folds = first[0].is_fold
    if (has_folds or second[0].is_fold) and [one.run.name for one in first] != [two.run.name for two in second]:
        return "their seeds or folds differ"
    if has_folds and len(np.unique(_indices(first))) * len(first) == len(_indices(first)):
        return "all of their folds test the same examples"
    if first[0].has_classes != second[0].has_classes:
        return "only one of them predicts classes"
    pairs = zip(first, second, strict=True) if has_folds else ((first[0], member) for member in (*first, *second))
    if not all(_is_same_test(one, two) for one, two in pairs):
        return "the sets that they were evaluated on differ"
    if not all(np.isfinite(member.scores).all() for member in (*first, *second)):
        return "some losses are not finite"
    return ""


def _is_same_test(one: Member, two: Member) -> bool:
    """Return whether digests, places and targets are the same; data may have no digest."""
    if one.run.evaluated != two.run.evaluated:
        return False
    data = [member.run.origin.get("data") or {} for member in (one, two)]
    names = {"index", "label", "target"} & one.columns.keys()
    return all(data[0].get(name) == data[1].get(name) for name in ("test", "files")) and all(
        name in two.columns and np.array_equal(one.columns[name], two.columns[name]) for name in names
    )


def _indices(members: Sequence[Member]) -> np.ndarray:
    """Return the indices of the members' test examples, one member after the other."""
    return np.concatenate([member.columns["index"] for member in members])


def _by_example(members: Sequence[Member]) -> np.ndarray:
    """Return the mean of the members' scores of each test example, by rising index."""
    _, places, counts = np.unique(_indices(members), return_inverse=True, return_counts=True)
    return np.bincount(places, np.concatenate([member.scores for member in members])) / counts
