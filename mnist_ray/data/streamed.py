"""Training data of unknown length: an ``IterableDataset``, a generator function, Hugging Face's ``streaming=True``.

The order of the stream is the order of the examples. Every worker reads the whole stream, and keeps its slices.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Streamed:
    """A stream of pairs (input, target), or of items that ``decode`` turns into such pairs.

    ``source`` is an iterable, or a function that returns an iterator; it must have the same examples in the same order
    each time it is started. If it has ``state_dict`` and ``load_state_dict``, a resumed run begins there; otherwise, it
    reads and drops the examples that it has seen.
    """

    def __init__(self, source: Any, decode: Callable[[Any], tuple[Any, Any]] | None = None) -> None:
        self.source, self.decode = source, decode
        self._beginning = copy.deepcopy(source.state_dict()) if self.has_state else None

    @property
    def has_state(self) -> bool:
        """Whether the source can say where it is, and go on there."""
        return hasattr(self.source, "state_dict") and hasattr(self.source, "load_state_dict")

    def __len__(self) -> int:
        """Return a number that no training reaches: a stream that ends begins again."""
        return sys.maxsize

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        items: Iterator[Any] = iter(self.source() if callable(self.source) else self.source)
        return items if self.decode is None else map(self.decode, items)

    def restarted(self) -> Iterator[tuple[Any, Any]]:
        """Return an iterator from the first example on: a source that has gone on somewhere may begin there again."""
        if self.has_state:
            self.source.load_state_dict(copy.deepcopy(self._beginning))
        return iter(self)

    def first(self, number: int) -> list[tuple[Any, Any]]:
        """Return the first examples, or fewer if the stream ends before; a stream that knows its place is set back."""
        state = copy.deepcopy(self.source.state_dict()) if self.has_state else None
        examples = list(itertools.islice(self, number))
        if self.has_state:
            self.source.load_state_dict(state)
        return examples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one example, after reading all before it."""
        return self.first(index + 1)[index]


def as_streamed(examples: Any) -> Any:
    """Return a stream as ``Streamed``, and other examples as they are."""
    return Streamed(examples) if is_stream(examples) and not isinstance(examples, Streamed) else examples


def is_stream(examples: Any) -> bool:
    """Return whether these are examples of unknown length."""
    if isinstance(examples, Streamed) or any(base.__name__ == "IterableDataset" for base in type(examples).__mro__):
        return True
    is_sized = hasattr(examples, "__getitem__") or hasattr(examples, "__len__")
    return not is_sized and (hasattr(examples, "__iter__") or callable(examples))
