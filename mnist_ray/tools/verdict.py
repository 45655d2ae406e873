"""Which of two sides is better on the same test examples, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mnist_ray.report.intervals import bootstrap_interval, mcnemar, mean_interval, seeds_interval, share_interval
from mnist_ray.text import count
from mnist_ray.tools.differences import as_dict
from mnist_ray.tools.sides import Member, Side
from mnist_ray.workload.figures import formatted

_MAX_P = 0.05


class Gain(NamedTuple):
    """How much better a side is than the first one, with the 95 % interval; negative if it is worse."""

    value: float
    low: float
    high: float
    how: str  # what decides, and what stays unknown
    p: float | None = None  # of McNemar's test, if that decides instead of the interval

    @property
    def is_sure(self) -> bool:
        """Whether a difference is shown."""
        return self.low > 0 or self.high < 0 if self.p is None else self.p < _MAX_P


@dataclass(frozen=True)
class Verdict:
    """A side against the first one."""

    sentence: str
    gain: Gain | None  # in points of right answers, else in loss; None if the sides cannot be compared
    won: np.ndarray  # indices of the examples on which the side is better, the largest change of the loss first
    lost: np.ndarray


def judge(first: Side, second: Side) -> Verdict:
    """Compare the second side with the first, example by example."""
    if reason := _why_not(first, second):
        sentence, none = f"{first.letter} and {second.letter} cannot be compared by example: {reason}", np.arange(0)
        return Verdict(sentence, None, none, none)
    gains = second.by_example(lambda member: member.scores) - first.by_example(lambda member: member.scores)
    won, lost = _changed(first, second, gains)
    gain = _gain(first, second, gains, len(won), len(lost))
    changed = (len(won), len(lost)) if first.members[0].has_classes else None
    return Verdict(_sentence(gain, (first.letter, second.letter), changed), gain, won, lost)


def _gain(first: Side, second: Side, gains: np.ndarray, won: int, lost: int) -> Gain:
    """Return the gain with the interval that fits the sides: folds, several seeds a side, or one run."""
    sides, mean = (first, second), float(gains.mean())
    if first.has_folds:
        of_folds = [float(two.scores.mean() - one.scores.mean()) for one, two in _pairs(first, second)]
        num_tested = len(first.indices) / len(first.members)
        interval = mean_interval(of_folds, overlap=num_tested / (len(gains) - num_tested))
        return Gain(float(np.mean(of_folds)), *interval, f"{len(of_folds)} folds, whose overlap in training is counted")
    if all(len(side.members) > 1 for side in sides):
        interval = seeds_interval(*(np.stack([member.scores for member in side.members]) for side in sides))
        numbers = " and ".join(str(len(side.members)) for side in sides)
        return Gain(mean, *interval, f"Welch's interval over {numbers} seeds, and the spread over the test examples")
    alone = " and ".join(side.letter for side in sides if len(side.members) == 1)
    unknown = f"the spread between seeds of {alone} is unknown: train with --num-seeds 6"
    if not first.members[0].has_classes or len(first.members) != len(second.members):
        return Gain(mean, *bootstrap_interval(gains), f"a bootstrap over the test examples; {unknown}")
    p, (low, high) = mcnemar(won, lost), share_interval(won, lost, len(gains))
    return Gain(mean, 100 * low, 100 * high, f"McNemar's exact test, p = {p:.2g}; {unknown}", p)


def _sentence(gain: Gain, letters: tuple[str, str], changed: tuple[int, int] | None) -> str:
    """Return a gain as a sentence; ``changed``: the numbers of examples won and lost, of classes."""
    sign = math.copysign(1, gain.value)
    numbers = (abs(gain.value), *sorted((sign * gain.low, sign * gain.high)))
    size, low, high = (formatted(value, ".2f" if changed else "number") for value in numbers)
    words = ("better than", "worse than") if gain.is_sure else ("ahead of", "behind")
    said = "" if gain.is_sure else "no significant difference: "
    said += f"{letters[1]} is {words[sign < 0]} {letters[0]} by {size} {'points' if changed else 'in loss'}"
    said += f" (95 %: {low} to {high})"
    if changed:
        said += f"; {count(sum(changed), 'example')} changed: {changed[0]:,} won, {changed[1]:,} lost"
    return said


def _why_not(first: Side, second: Side) -> str:
    """Return why two sides cannot be compared example by example; empty if they can."""
    sides = (first, second)
    for side in sides:
        if not all({"index", "loss"} <= member.columns.keys() for member in side.members):
            return f"{side.letter} has no predictions.parquet with the loss of each example"
    if first.has_folds != second.has_folds:
        return f"only {(first if first.has_folds else second).letter} is a cross-validation"
    if first.has_folds and [one.name for one in first.members] != [two.name for two in second.members]:
        return "their seeds or folds differ"
    if first.has_folds and len(np.unique(first.indices)) * len(first.members) == len(first.indices):
        return "all of their folds test the same examples"
    if other := sorted({*first.metrics} ^ {*second.metrics}):
        return f"their metrics differ: {', '.join(other)}"
    if first.members[0].has_classes != second.members[0].has_classes:
        return "only one of them predicts classes"
    if not all(_is_same_test(one, two) for one, two in _pairs(first, second)):
        return "their test sets differ"
    if not all(np.isfinite(member.losses).all() for side in sides for member in side.members):
        return "some losses are not finite"
    return ""


def _changed(first: Side, second: Side, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the examples that the second side wins and loses, the largest change of the loss first.

    With classes, most members of the winner must have the example right, and at most half of the other's.
    """
    before, after = (side.by_example(lambda member: member.losses) for side in (first, second))
    if first.members[0].has_classes:
        was_right, is_right = (side.by_example(lambda member: member.scores) > 50 for side in (first, second))
        gains = is_right.astype(int) - was_right
    order = np.argsort(-np.abs(after - before), kind="stable")
    indices, gains = np.unique(first.indices)[order], gains[order]
    return indices[gains > 0], indices[gains < 0]


def _pairs(first: Side, second: Side) -> list[tuple[Member, Member]]:
    """Return the members to be tested on the same examples: fold by fold, or each one and the first side's first."""
    if first.has_folds:
        return [*zip(first.members, second.members, strict=True)]
    return [(first.members[0], member) for member in (*first.members, *second.members)]


def _is_same_test(one: Member, two: Member) -> bool:
    """Return whether digests, places and targets are the same; data may have no digest."""
    data = [as_dict(member.origin.get("data")) for member in (one, two)]
    if any(data[0].get(name) != data[1].get(name) for name in ("test", "files")):
        return False
    names = {"index", "label", "target"} & one.columns.keys()
    return all(name in two.columns and np.array_equal(one.columns[name], two.columns[name]) for name in names)
