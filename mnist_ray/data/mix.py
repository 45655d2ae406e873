"""Several sources of examples in given shares: ``Data(train=Mix({"web": (web, 0.7), "books": (books, 0.3)}))``."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnist_ray.data.data import Arrays, Blocks, Sources
from mnist_ray.data.streamed import Streamed, is_stream
from mnist_ray.errors import UsageError


class Mix:
    """Sources by name, each with its share of the examples that training sees: any positive numbers, as weights.

    Each source has the same form: ``Arrays``, ``Blocks``, or a ``Dataset``. A pass has as many examples as all sources
    together; examples of a small source with a large share come several times. Raises UsageError.
    """

    def __init__(self, sources: Mapping[str, tuple[Any, float]]) -> None:
        for name, source in sources.items():
            if not isinstance(source, tuple) or len(source) != 2 or not 0 < source[1] < np.inf:
                raise UsageError(f"Mix: {name} must be a pair (source, share), with a positive share")
        if not sources:
            raise UsageError("Mix: there are no sources")
        if streams := [name for name, (source, _) in sources.items() if is_stream(source)]:
            raise UsageError(f"Mix: {streams[0]} is a stream without a length; mix streams in a generator of your own")
        parts, shares = zip(*sources.values(), strict=True)
        ends = itertools.accumulate(map(len, parts))
        self.sources = Sources(tuple(sources), tuple(share / sum(shares) for share in shares), tuple(ends))
        self.examples = _joined(parts)

    def __len__(self) -> int:
        return self.sources.ends[-1]


def plain(examples: Any) -> Any:
    """Return a field of ``Data`` as the rest of the package knows it: of a Mix, all examples; a stream as Streamed."""
    if isinstance(examples, Mix):
        return examples.examples
    return Streamed(examples) if is_stream(examples) and not isinstance(examples, Streamed) else examples


class _Concatenated:
    """Map-style data sets one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts, self._ends = parts, [*itertools.accumulate(map(len, parts))]
        self.classes = getattr(parts[0], "classes", None)  # of torchvision, in the order of their numbers
        if any(getattr(part, "classes", None) != self.classes for part in parts):
            raise UsageError("Mix: the sources differ in classes, or in the order of their classes")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        number, inside = _find(self._ends, index)
        return self._parts[number][inside]


class _ConcatenatedBlocks(Blocks):
    """The blocks of several sources, one after the other."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self._parts, self._ends = parts, [*itertools.accumulate(len(part.sizes) for part in parts)]
        self.sizes = [size for part in parts for size in part.sizes]
        names = [
            part.block_names or [f"block {number} of source {source}" for number in range(len(part.sizes))]
            for source, part in enumerate(parts)
        ]
        self.block_names = [name for of_part in names for name in of_part]
        identities = [part.identity for part in parts]
        self.identity = None if None in identities else "\n".join(map(str, identities))

    def read(self, block: int) -> Any:
        """Read a block of its source."""
        number, inside = _find(self._ends, block)
        return self._parts[number].read(inside)


def _find(ends: list[int], index: int) -> tuple[int, int]:
    """Return the number of the part that has an index, and the index inside this part."""
    number = bisect.bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


def _joined(parts: Sequence[Any]) -> Any:
    if all(isinstance(part, Blocks) for part in parts):
        return _ConcatenatedBlocks(parts)
    if not all(isinstance(part, Arrays) for part in parts):
        if any(isinstance(part, (Arrays, Blocks)) for part in parts):
            raise UsageError("Mix: the sources must all be Arrays, or all Blocks, or all Datasets")
        return _Concatenated(parts)
    first, *others = ({name: array.shape[1:] for name, array in part.named.items()} for part in parts)
    for other in others:
        if other != first:
            raise UsageError(f"Mix: the arrays of the sources differ in shape: {first} and {other}")
    return Arrays(*(_stacked([getattr(part, field) for part in parts]) for field in ("inputs", "targets")))


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: np.concatenate([value[name] for value in values]) for name in values[0]}
    return np.concatenate(values)
