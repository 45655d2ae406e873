"""Compares runs: what differs, their figures, and which is better on the same test examples."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_ray.errors import UsageError
from mnist_ray.output import finite
from mnist_ray.storage import RunFolder
from mnist_ray.text import count, in_words, redact
from mnist_ray.tools.differences import lines_of
from mnist_ray.tools.sides import Side, differences
from mnist_ray.tools.verdict import Verdict, judge
from mnist_ray.workload.figures import formatted


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, and each of them against the first. ``print`` shows it as the command does."""

    sides: Sequence[Side]
    verdicts: Sequence[Verdict]  # on the second side, the third, …

    @property
    def table(self) -> list[list[str]]:
        """A header, then a row for each run; of several members, the mean and the standard deviation."""
        forms = {name: form for side in reversed(self.sides) for name, form in side.forms.items()}
        rows = [["", "run", "members", *map(in_words, forms)]]
        for side in self.sides:
            members = count(len(side.members), "fold" if side.has_folds else "seed")
            rows.append([side.letter, side.run.name, members])
            rows[-1] += [_cell(side.values(name), form) for name, form in forms.items()]
        return rows

    @property
    def lines(self) -> list[list[tuple[str, str]]]:
        """What differs from the first side, and the verdict: labels and texts for each other side."""
        first, found = self.sides[0], []
        for side, verdict in zip(self.sides[1:], self.verdicts, strict=True):
            differing = lines_of(differences(first, side), f"{first.letter} or {side.letter} has no record of it")
            by = [("method", verdict.gain.how)] if verdict.gain else []
            found.append([*differing, ("verdict", verdict.sentence), *by])
        return found

    def __str__(self) -> str:
        table = [[*map(redact, row)] for row in self.table]  # a name in a run's files may hold a line that looks real
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([*rows, *(f"{label:<10} {redact(text)}" for lines in self.lines for label, text in lines)])

    def to_dict(self) -> dict[str, Any]:
        """Return all as values that JSON can hold: of each figure, the values of all members."""
        first, *others = self.sides
        runs = {
            side.letter: {"run": side.run.uri, **{name: side.values(name) for name in side.forms}}
            for side in self.sides
        }
        against = {}
        for side, verdict in zip(others, self.verdicts, strict=True):
            gain = verdict.gain._asdict() | {"is_sure": verdict.gain.is_sure} if verdict.gain else None
            indices = {"won": verdict.won.tolist(), "lost": verdict.lost.tolist()}
            differing = differences(first, side)
            against[side.letter] = {"sentence": verdict.sentence, "gain": gain, **indices, "differences": differing}
        return finite({"runs": runs, "against_first": against})


def compare(runs: Sequence[RunFolder]) -> Comparison:
    """Read runs, and compare each with the first. Raises UsageError and JobError."""
    uris, letters = [run.uri for run in runs], string.ascii_uppercase
    if not 2 <= len(runs) <= len(letters):
        raise UsageError(f"compare takes 2 to {len(letters)} runs, not {len(runs)}")
    if twice := [uri for uri in uris if uris.count(uri) > 1]:
        raise UsageError(f"{twice[0]} is given twice; name each run once")
    first, *others = sides = [Side.read(letter, run) for letter, run in zip(letters, runs, strict=False)]
    return Comparison(sides, [judge(first, other) for other in others])


def _cell(values: Sequence[float], form: str) -> str:
    mean = formatted(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {formatted(float(np.std(values, ddof=1)), form)}"
