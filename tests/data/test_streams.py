"""Training data of unknown length."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from mnist_ray import train
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch, batch_loader, order_of
from mnist_ray.data.data import Split, Streamed
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.errors import ExampleError, JobError, UsageError
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Arrays, Data, Regression
from tests.conftest import weights

CONFIG = TrainConfig(batch_size=7, num_steps=20)
CPU = torch.device("cpu")


def endless() -> Iterator[tuple[np.ndarray, float]]:
    """Yield numbers, each with a random one."""
    for number in itertools.count():
        yield np.array([number, np.random.random()], np.float32), float(number)


class Remembering(IterableDataset):
    """A stream of 50 examples that knows where it is; it counts the examples that it yields."""

    def __init__(self) -> None:
        self.place = self.num_yielded = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        while self.place < 50:
            self.place += 1
            self.num_yielded += 1
            yield np.full(2, self.place, np.float32), float(self.place)
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Continuing(Remembering):
    """Begins where the last loaded state was each time that it is started, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        for place in range(self.start + 1, 51):
            self.place = place
            yield np.full(2, place, np.float32), float(place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.place = state["place"]


def steps_of(
    source: Any, rank: int = 0, world_size: int = 1, first_step: int = 0, read_to: Any = None, num_processes: int = 0
) -> Iterator[MicroBatch]:
    """Yield a rank's slices, as the engine reads them: two epochs share a loader."""
    batches = Batches(Split(Streamed(source)), CPU)
    batches.reader.read_to = read_to
    assert CONFIG.num_steps
    for first, stop in ((first_step, 15), (max(first_step, 15), CONFIG.num_steps)):
        settings = CONFIG.batch_size, CONFIG.seed, 0, rank, world_size, first
        sampler = ShardedBatchSampler(len(batches), *settings, order=order_of(batches.split, CONFIG, 0))
        yield from itertools.islice(batch_loader(batches, sampler, CPU, num_processes), max(0, stop - first))


def values_of(batch: MicroBatch) -> list[Any]:
    return [] if batch.is_filler else torch.cat([batch.inputs, batch.targets[:, None]], 1).tolist()


@pytest.mark.parametrize("num_processes", [0, 2])
@pytest.mark.parametrize("source", [lambda: endless, Remembering, Continuing], ids=["function", "state", "continuing"])
def test_batches_do_not_depend_on_the_ranks_and_a_resumed_run_has_the_same(
    source: Callable[[], Any], num_processes: int
) -> None:
    whole = [*steps_of(source(), num_processes=num_processes)]
    expected = [values_of(batch) for batch in whole]
    first = 7.0 if source() is endless else 8.0
    assert [row[-1] for row in expected[1]] == [first + number for number in range(7)]
    for world_size in (2, 3):
        ranks = [[values_of(batch) for batch in steps_of(source(), rank, world_size)] for rank in range(world_size)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == expected
    for done, world_size in ((1, 3), (9, 2), (15, 1), (19, 2)):
        read_to = whole[done - 1].read_to
        ranks = [
            [values_of(batch) for batch in steps_of(source(), rank, world_size, done, read_to, num_processes)]
            for rank in range(world_size)
        ]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == expected[done:]


def test_a_resumed_run_reads_a_stream_that_knows_its_place_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_ray.data.readers._NOTED_EVERY_S", 0.0)
    read_to = [*steps_of(Remembering())][16].read_to
    assert read_to == {"next": 119, "rounds": 2, "state": {"place": 19}}
    resumed = Remembering()
    assert len([*steps_of(resumed, first_step=17, read_to=read_to)]) == 3
    assert resumed.num_yielded == 21


def of_items(*items: Any) -> Callable[[], Iterator[Any]]:
    return lambda: iter(items)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (of_items(), "the stream of training examples is empty"),
        (lambda: (1 / (3 - number) for number in range(9)), "train example 3 cannot be read: ZeroDivisionError"),
    ],
)
def test_a_stream_that_fails_is_one_line(source: Any, message: str) -> None:
    with pytest.raises(ExampleError, match=message):
        [*steps_of(source)]


class Streaming(Regression):
    """Learns from a stream."""

    def load_data(self) -> Data:
        rng = np.random.default_rng(0)
        few = Arrays(rng.random((20, 2), np.float32), rng.random(20))
        return Data(self.stream(), few, few)

    def stream(self) -> Any:
        return Streamed(Remembering(), decode=lambda item: (item[0] / 50, item[1] / 50))

    def create_model(self) -> nn.Module:
        return nn.Linear(2, 1)


SETTINGS: dict[str, Any] = {
    "num_workers": 0,
    "num_steps": 20,
    "validate_every": 6,
    "batch_size": 7,
    "learning_rate": 0.1,
}


class Stops(Callback):
    def __init__(self) -> None:
        self.num_asked = 0

    def on_step(self, state: Any) -> None:
        self.last = state.total_step

    def wants_stop(self) -> bool:
        return self.last >= 9


class Stopping(Streaming):
    callbacks: Sequence[Any] = (Stops(),)


def test_a_run_on_a_stream_that_ends_begins_it_again_and_resumes_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Streaming, **SETTINGS, storage_path=tmp_path, run_name="whole")
    said = capsys.readouterr().out
    assert "Streaming: a stream of examples to train on, 20 for validation" in said
    settings = {**SETTINGS, "checkpoint_every": 3, "storage_path": tmp_path, "run_name": "stopped"}
    with pytest.raises(JobError, match="a callback has stopped the training"):
        train(Stopping, **settings)
    last = max((tmp_path / "stopped").glob("checkpoint_epoch*"))
    assert torch.load(last / "training.pt")["read_to"]["state"] is not None
    Stopping.callbacks = ()
    train(Stopping, **settings, resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["test_rmse"] < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_size": 5}, "nothing can be held out from a stream; give Data.validation instead"),
        ({"limit": 0.5}, "--limit and --overfit-batches do not work with a stream"),
        ({"overfit_batches": 1}, "--limit and --overfit-batches do not work with a stream"),
    ],
)
def test_settings_that_do_not_fit_a_stream_are_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    class Misused(Streaming):
        def load_data(self) -> Data:
            data = super().load_data()
            return Data(data.train, data.test)

    with pytest.raises(UsageError, match=message):
        train(Misused, **{**SETTINGS, "validate_every": None, "storage_path": tmp_path, **settings})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda few: Data(few, endless),  # type: ignore[arg-type]
            "test is a stream without a length; only the training data may be one",
        ),
        (lambda few: Data(endless, few, weights=np.ones(9)), "weights are not for a stream"),
        (lambda few: Data(iter([]), few), "train is an iterator, which can be read once; give the function that"),
        (lambda few: Data(of_items(), few), "the stream of training examples is empty"),
        (lambda few: Data(of_items(3, 4), few), "a Dataset's items must be pairs"),
    ],
)
def test_a_wrong_stream_is_one_line(data: Callable[[Arrays], Data], message: str, tmp_path: Path) -> None:
    class Wrong(Streaming):
        def load_data(self) -> Data:
            return data(Arrays(np.zeros((9, 2), np.float32), np.zeros(9)))

    with pytest.raises(UsageError, match=message):
        train(Wrong, **{**SETTINGS, "validate_every": None, "storage_path": tmp_path})
