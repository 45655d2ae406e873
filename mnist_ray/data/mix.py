"""Several sources of examples in given shares: ``Data(train=Mix({"web": (web, 0.7), "books": (books, 0.3)}))``."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
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
        parts, shares = (
            [part for part, _ in sources.values()],
            np.array([share for _, share in sources.values()], float),
        )
        self.sources = Sources(
            (*sources,), (*(shares / shares.sum()).tolist(),), (*np.cumsum([*map(len, parts)]).tolist(),)
        )
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

    def __init__(self, parts: list[Any]) -> None:
        self._parts, self._ends = parts, np.cumsum([*map(len, parts)]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]


class _ConcatenatedBlocks(Blocks):
    """The blocks of several sources, one after the other."""

    def __init__(self, parts: list[Blocks]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part.sizes) for part in parts]).tolist()
        self.sizes = [size for part in parts for size in part.sizes]
        names = [part.block_names or [f"block {number}" for number in range(len(part.sizes))] for part in parts]
        self.block_names = [name for of_part in names for name in of_part]
        identities = [part.identity for part in parts]
        self.identity = None if None in identities else "\n".join(map(str, identities))

    def read(self, block: int) -> Any:
        """Read a block of its source."""
        number = bisect.bisect_right(self._ends, block)
        return self._parts[number].read(block - (self._ends[number - 1] if number else 0))


def _joined(parts: list[Any]) -> Any:
    if all(isinstance(part, Blocks) for part in parts):
        return _ConcatenatedBlocks(parts)
    if not all(isinstance(part, Arrays) for part in parts):
        if any(isinstance(part, (Arrays, Blocks)) for part in parts):
            raise UsageError("Mix: the sources must all be Arrays, or all Blocks, or all Datasets")
        return _Concatenated(parts)
    named = [part.named for part in parts]
    for other in named[1:]:
        if (
            forms := [{name: array.shape[1:] for name, array in of_part.items()} for of_part in (named[0], other)]
        ) and forms[0] != forms[1]:
            raise UsageError(f"Mix: the arrays of the sources differ in shape: {forms[0]} and {forms[1]}")
    return Arrays(*(_stacked([getattr(part, field) for part in parts]) for field in ("inputs", "targets")))


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: np.concatenate([value[name] for value in values]) for name in values[0]}
    return np.concatenate(values)
