"""Batches of a stream: read from the beginning, or from where a checkpoint says that reading may go on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Collate, ExampleBatches, MicroBatch
from mnist_ray.data.data import Split
from mnist_ray.data.order import InOrder
from mnist_ray.data.sampler import Request
from mnist_ray.errors import ExampleError

_NOTED_EVERY_S = 1.0  # a stream's state; a resumed run reads again what came after it
_END = object()


class StreamBatches(ExampleBatches):
    """A stream, whose examples have indices from 0 on. Requests must not go back.

    A micro-batch that ends a step has in ``read_to`` where a run that resumes after this step may go on reading.
    """

    max_processes = 1  # the others would read the same

    def __init__(self, split: Split, collate: Collate | None) -> None:
        super().__init__(split, 0, collate)
        self.read_to: dict[str, Any] | None = None  # where to begin; None: at the first example
        self._source = split.examples.source
        self._items: Iterator[Any] | None = None
        self._batch: list[Any] = []  # the last one
        self._next = self._rounds = 0  # the index of the next example; how often the stream has begun again
        self._noted_s = 0.0
        self._loader: Iterator[MicroBatch] | None = None

    def order(self, config: TrainConfig, *position: int) -> InOrder:  # type: ignore[override]
        """Return the order of the stream."""
        return InOrder()

    def loaded_by(self, create_loader: Callable[[Dataset], Iterable[MicroBatch]]) -> Iterator[MicroBatch]:
        """Return the loader of the first epoch, in all of them: it continues to read."""
        if self._loader is None:
            # Of a copy: in a cycle of references, Python would close the loader's queues first, and its process last.
            self._loader = iter(create_loader(copy.copy(self)))
        return self._loader

    def __getitem__(self, request: Request) -> MicroBatch:
        size = request.global_size
        first = int(request.indices[0]) // size * size  # of the whole batch
        if self._items is None:
            self._begin()
        while self._next <= first:
            self._read_batch(size)
        examples = [self._batch[index - first] for index in request.indices.tolist()]
        batch = self._joined(examples, request.indices, request)
        return batch._replace(read_to=self._noted()) if request.ends_step else batch

    def _read_batch(self, size: int) -> None:
        """Read the next batch, also what other ranks compute of it: a stream may draw random numbers on its way."""
        self._seed(self._next)
        self._batch = [self._checked(self._next + number) for number in range(size)]
        self._next += size

    def _begin(self) -> None:
        if self.read_to is not None and self.read_to["state"] is not None:
            self._source.load_state_dict(self.read_to["state"])
            self._next, self._rounds = self.read_to["next"], self.read_to["rounds"]
        self._items = iter(self.split.examples)

    def _read(self, index: int) -> Any:
        """Return the next example; at the end of the stream, begin again."""
        assert self._items is not None
        example = next(self._items, _END)
        if example is _END:
            self._items = self.split.examples.restarted()
            self._rounds += 1
            example = next(self._items, _END)
        if example is _END:
            raise ExampleError("the stream of training examples is empty")
        return example

    def _noted(self) -> dict[str, Any]:
        if (
            self.read_to is None
            or time.monotonic() - self._noted_s > _NOTED_EVERY_S
            or self._rounds != self.read_to["rounds"]
        ):
            state = copy.deepcopy(self._source.state_dict()) if self.split.examples.has_state else None
            self.read_to = {"next": self._next, "rounds": self._rounds, "state": state}
            self._noted_s = time.monotonic()
        return self.read_to
