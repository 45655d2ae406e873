"""Data sets: arrays, any map-style ``Dataset``, blocks, or a stream; and their splits."""

from __future__ import annotations

import copy
import itertools
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnist_ray.data.order import AllBut
from mnist_ray.errors import UsageError
from mnist_ray.text import count

if TYPE_CHECKING:
    from torch.utils.data import Dataset


def map_arrays(function: Callable[[np.ndarray], Any], values: Any) -> Any:
    """Apply a function to an array, or to each array of a dict."""
    if isinstance(values, Mapping):
        return {name: function(array) for name, array in values.items()}
    return function(values)


def owner_of(array: np.ndarray) -> Any:
    """Return what owns the memory that an array shows: an array, a mapped file, or an object without ``base``."""
    owner: Any = array
    while not isinstance(owner, np.memmap) and getattr(owner, "base", None) is not None:
        owner = owner.base
    return owner


def span_of(array: np.ndarray) -> int:
    """Return how many bytes of memory an array shows; fewer than ``nbytes`` if its elements overlap."""
    steps = zip(array.shape, array.strides, strict=True)
    return array.itemsize + sum((size - 1) * abs(stride) for size, stride in steps) if array.size else 0


def may_be_copied(array: np.ndarray) -> bool:
    """Return whether a copy of an array is no larger than its memory, which is this process's own."""
    return not isinstance(owner_of(array), (np.memmap, mmap.mmap)) and array.nbytes <= span_of(array)


@dataclass(frozen=True)
class Arrays:
    """Examples as NumPy arrays of any shape and dtype, in memory or memory-mapped; or as dicts of such arrays."""

    inputs: Any  # (N, ...)
    targets: Any  # (N, ...); for classification, whole numbers from 0 on, (N,)

    def __len__(self) -> int:
        first: Any = next(iter(self.targets.values())) if isinstance(self.targets, Mapping) else self.targets
        return len(first)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        """Return one example, (input, target); or the inputs and the targets of several."""
        return map_arrays(lambda array: array[index], self.inputs), map_arrays(lambda array: array[index], self.targets)

    @property
    def named(self) -> dict[str, np.ndarray]:
        """All arrays, by their names in messages, such as ``inputs`` or ``inputs["mask"]``."""
        found: dict[str, np.ndarray] = {}
        for name, values in (("inputs", self.inputs), ("targets", self.targets)):
            parts = values.items() if isinstance(values, Mapping) else ()
            found |= {f'{name}["{part}"]': array for part, array in parts} or {name: values}
        return found

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return sum(array.nbytes for array in self.named.values())


class Blocks:
    """Examples that are read a block at a time, such as a file. A subclass sets ``sizes`` and defines ``read``.

    Other processes get copies of the object, so it must not hold the examples. ``read`` must not draw random numbers.
    """

    sizes: Sequence[int]  # the number of examples in each block
    block_names: Sequence[str] = ()  # what messages call the blocks; by default, their numbers
    identity: str | None = None  # a text that changes with the data; None: use the files in ``Data.files``
    _last: tuple[int, Any] = (-1, None)  # the last block that was read for one example

    def read(self, block: int) -> Arrays | Sequence[tuple[Any, Any]]:
        """Return a block's examples. Several threads call this at once; if it raises OSError, they call it again."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(np.sum(self.sizes))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one example, (input, target)."""
        edges = np.append(0, np.cumsum(self.sizes))
        block = int(np.searchsorted(edges, index, side="right")) - 1
        if self._last[0] != block:
            self._last = block, self.read(block)
        return self._last[1][index - edges[block]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_last"}


class Streamed:
    """A stream of pairs (input, target), or of items that ``decode`` turns into such pairs; its length is unknown.

    Examples come in the stream's order. Every worker reads the whole stream, and keeps its slices. ``source`` is an
    iterable, or a function that returns an iterator; it must have the same examples in the same order each time it is
    started. If it has ``state_dict`` and ``load_state_dict``, a resumed run begins there; otherwise, it reads and drops
    the examples that it has seen.
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
    """Return examples of unknown length as ``Streamed``, and others as they are."""
    is_sized = hasattr(examples, "__getitem__") or hasattr(examples, "__len__")
    is_stream = any(base.__name__ == "IterableDataset" for base in type(examples).__mro__)  # torch takes a second
    is_stream |= not is_sized and (hasattr(examples, "__iter__") or callable(examples))
    return Streamed(examples) if is_stream and not isinstance(examples, Streamed) else examples


Transform = Callable[[Any], Any]
"""Takes and returns an example's input. Its random numbers follow from the run's seed, the pass and the example."""


@dataclass(frozen=True)
class Data:
    """The result of a workload's ``load_data``.

    The driver loads in-memory arrays and ``Blocks``; Ray's object store shares them, one copy per node. Every worker
    calls ``load_data`` for ``Dataset``s, and for arrays that are memory-mapped or whose rows overlap, such as
    sliding windows. A ``Dataset``'s items are pairs (input, target).
    """

    train: Arrays | Dataset | Blocks | Iterable[Any] | Callable[[], Iterable[Any]]  # or a stream to train on
    test: Arrays | Dataset | Blocks | None = None  # to evaluate the trained model, once; None: on the validation set
    validation: Arrays | Dataset | Blocks | Mapping[str, Arrays | Dataset | Blocks] | None = None
    """None: held out from ``train``. Of several sets, by name, the first chooses the checkpoint; all are reported."""
    name: str = ""  # shown to users; default: the workload's name
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the model needs to know, as JSON. Every checkpoint keeps it; every process has it as ``self.metadata``."""
    files: Sequence[str | Path] = ()
    """The files of a ``Dataset`` or of ``Blocks``: a run is not resumed if they have changed."""
    weights: np.ndarray | None = None  # (N,): examples of ``train`` are drawn with replacement, in these proportions
    groups: np.ndarray | None = None
    """(N,): examples of ``train`` with one value, e.g. a patient, are held out together."""
    train_transform: Transform | None = None
    """Called on the input of each example that is trained on, not of those that are held out from ``train``."""
    transform: Transform | None = None  # called on the input of every example, after ``train_transform``

    @property
    def validation_sets(self) -> dict[str, Any]:
        """The validation sets by name; a single one is called ''."""
        if self.validation is None:
            return {}
        return {**self.validation} if isinstance(self.validation, Mapping) else {"": self.validation}

    @property
    def parts(self) -> dict[str, Any]:
        """All sets that there are, by their names in messages, such as ``train`` or ``validation shifted``."""
        validation = {set_name("validation", name): examples for name, examples in self.validation_sets.items()}
        return {"train": self.train, **validation, **({} if self.test is None else {"test": self.test})}


Origin = Literal["train", "validation", "test"]
Evaluated = Literal["test", "val"]


def set_name(origin: Origin, name: str = "") -> str:
    """Return what messages call a set of a field of ``Data``, such as ``validation shifted``."""
    return f"{origin} {name}".rstrip()


@dataclass(frozen=True, eq=False)
class Split:
    """Some examples of a field of ``Data``, with a weight and a group for each if the data have them."""

    examples: Any
    indices: np.ndarray | AllBut | None = None  # of the split's examples in the field; None: all
    origin: Origin = "train"  # the field
    name: str = ""  # of one of several validation sets
    transforms: Sequence[Transform] = ()  # of the examples' inputs, one after another
    weights: np.ndarray | None = None  # (N,): training draws the split's examples in these proportions
    groups: np.ndarray | None = None  # (N,): examples with one value are held out together
    is_copied: bool = False  # whether ``examples`` has only the split's, one after another

    def __len__(self) -> int:
        return len(self.examples) if self.indices is None else len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        """Return one example's (input, target). Raises UsageError if a ``Dataset`` does not return pairs."""
        example = self.examples[int(self.rows_of(np.array([position]))[0])]
        if isinstance(example, (tuple, list)) and len(example) == 2:
            return self.transform(example[0]), example[1]
        got = count(len(example), "value") if isinstance(example, (tuple, list)) else type(example).__name__
        raise UsageError(
            f"{self.origin}: a Dataset's items must be pairs (input, target), not {got}",
            fix="either may be a tuple or a dict; if there are no targets, repeat the input",
        )

    def transform(self, inputs: Any) -> Any:
        """Return an example's input after the transforms."""
        for transform in self.transforms:
            inputs = transform(inputs)
        return inputs

    def transformed(self, *transforms: Transform | None) -> Split:
        """Return the same examples with these transforms instead."""
        return replace(self, transforms=[transform for transform in transforms if transform is not None])

    def indices_of(self, positions: Any) -> Any:
        """Turn positions in this split into indices in the field of ``Data``."""
        return positions if self.indices is None else self.indices[positions]

    def rows_of(self, positions: Any) -> Any:
        """Turn positions in this split into those in ``examples``."""
        return positions if self.is_copied else self.indices_of(positions)

    @property
    def all_indices(self) -> np.ndarray:
        """The indices of these examples in the field of ``Data``, (N,)."""
        return np.arange(len(self)) if self.indices is None else np.asarray(self.indices)

    @property
    def is_stream(self) -> bool:
        """Whether the examples are a stream."""
        return isinstance(self.examples, Streamed)

    @property
    def is_in_blocks(self) -> bool:
        """Whether the examples are read a block at a time."""
        return isinstance(self.examples, Blocks)

    @property
    def is_in_memory(self) -> bool:
        """Whether the job sends the examples to other processes; if not, each process opens them."""
        return isinstance(self.examples, Arrays) and all(map(may_be_copied, self.examples.named.values()))

    @property
    def whole_arrays(self) -> Arrays | None:
        """The arrays in memory that have the split's examples and no others; else None."""
        return self.examples if self.is_in_memory and (self.is_copied or self.indices is None) else None

    @property
    def block_sizes(self) -> np.ndarray | None:
        """How many of the split's examples each block has, (blocks,); None without blocks, or if not in their order."""
        if not self.is_in_blocks:
            return None
        ends, indices = np.cumsum(self.examples.sizes), self.indices
        if isinstance(indices, AllBut):
            ends = indices.rank(ends)
        elif indices is not None:
            if (np.diff(indices) <= 0).any():
                return None
            ends = np.searchsorted(indices, ends)
        return np.diff(ends, prepend=0)

    def take(self, positions: np.ndarray | AllBut | slice) -> Split:
        """Return the examples at ``positions``. Arrays in memory are copied; of a slice, they are a view."""
        if isinstance(positions, slice) and not self.is_in_memory:
            positions = np.arange(*positions.indices(len(self)))
        columns = {"weights": self.weights, "groups": self.groups}
        taken: dict[str, Any] = {name: column[positions] for name, column in columns.items() if column is not None}
        if self.is_in_memory:
            taken |= {"examples": Arrays(*self.examples[self.rows_of(positions)]), "is_copied": True}
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        return replace(self, indices=self.indices_of(positions), **taken)


@dataclass(frozen=True)
class Splits:
    """A workload's data, ready for a run."""

    name: str
    train: Split
    validation: Split  # empty if nothing is held out
    test: Split  # what the trained model is evaluated on; without a test set, the validation set
    files: Sequence[str | Path] = ()  # of the examples, if the workload names them
    evaluated: Evaluated = "test"  # the set that ``test`` is; results have it in the names of their figures
    others: Sequence[Split] = ()  # the validation sets after the first one

    @property
    def validation_sets(self) -> list[Split]:
        """All validation sets; none if nothing is held out."""
        return [self.validation, *self.others] if len(self.validation) else []
