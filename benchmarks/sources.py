"""Compare how fast JSON lines and tar files are read with a plain loop over the same files.

    python benchmarks/sources.py --rounds 15    # three minutes on two cores

Guards that reading in blocks costs little: at least 0.9 of a plain loop's examples/s, in one process on one thread.

Writes texts and numbers as JSON lines, and pictures of 64 × 64 as JPEG in tar files. In each round, a plain loop opens
the files, parses and decodes them with the same function; then the source reads its blocks, one after the other.
Then both also shuffle the examples and join them to batches of 128: the loop in a buffer of 1,000 examples, the source
over four blocks and all files, while its threads read ahead. Prints how long it takes to open a source without an index
and with one, examples/s, and ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.batches import BlockBatches, allow_read_only, batch_loader
from mnist_ray.data.data import Blocks, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.sources import JsonLines, Tars, open_picture
from mnist_ray.process import keep_freed_memory

NUM_FILES = 4
NUM_SHUFFLED = 1000
CONFIG = TrainConfig(num_epochs=1, batch_size=128)
Example = tuple[Any, int]


def of_text(review: dict[str, Any]) -> Example:
    """Return a text's first 256 bytes, (256,) uint8, and its label."""
    return np.frombuffer(review["text"].encode()[:256].ljust(256), np.uint8), review["label"]


def of_numbers(row: dict[str, Any]) -> Example:
    """Return 32 numbers, (32,), and their label."""
    return np.array(row["x"]), row["label"]


def of_picture(sample: dict[str, Any]) -> Example:
    """Return a picture, (64, 64, 3) uint8, and its label."""
    return np.array(open_picture(io.BytesIO(sample["jpg"]))), int(sample["cls"])


def write(folder: Path) -> None:
    """Write the files of all three kinds."""
    rng, words = np.random.default_rng(0), [f"word{number}" for number in range(500)]
    for kind in ("texts", "numbers", "pictures"):
        (folder / kind).mkdir()
    for number in range(NUM_FILES):
        with (folder / "texts" / f"{number}.jsonl").open("w") as file:
            for index in range(15_000):
                text = " ".join(words[word] for word in rng.integers(500, size=60))
                file.write(json.dumps({"id": index, "text": text, "label": index % 10}) + "\n")
        with (folder / "numbers" / f"{number}.jsonl").open("w") as file:
            for index in range(15_000):
                file.write(json.dumps({"x": rng.random(32).round(4).tolist(), "label": index % 10}) + "\n")
        with tarfile.open(folder / "pictures" / f"{number}.tar", "w") as tar:
            for index in range(2500):
                content = io.BytesIO()
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                Image.fromarray(pixels).save(content, "jpeg")
                for name, data in (("jpg", content.getvalue()), ("cls", b"%d" % (index % 10))):
                    info = tarfile.TarInfo(f"{index:05}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def plain_lines(folder: Path, decode: Callable[[dict[str, Any]], Example]) -> Iterator[Example]:
    """Read JSON lines in a plain loop."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield decode(json.loads(line))


def plain_tars(folder: Path, decode: Callable[[dict[str, Any]], Example]) -> Iterator[Example]:
    """Read tar files in a plain loop."""
    for path in sorted(folder.glob("*.tar")):
        sample: dict[str, Any] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield decode(sample)
                    sample = {}
                file = tar.extractfile(member)
                assert file is not None
                sample |= {"__key__": key, field: file.read()}
        yield decode(sample)


def shuffled(examples: Iterator[Example]) -> Iterator[Example]:
    """Shuffle examples in a buffer, as readers of streams do; fewer are mixed than by the source."""
    buffer = [*islice(examples, NUM_SHUFFLED)]
    for example in examples:
        place = random.randrange(NUM_SHUFFLED)
        yield buffer[place]
        buffer[place] = example
    random.shuffle(buffer)
    yield from buffer


def join(examples: Iterator[Example]) -> None:
    """Join examples to batches."""
    while some := [*islice(examples, CONFIG.batch_size)]:
        default_collate(some)


def read_blocks(source: Blocks) -> None:
    """Read all blocks."""
    for block in range(len(source.sizes)):
        source.read(block)


def read_batches(source: Blocks) -> None:
    """Read the batches of an epoch, as a training does."""
    dataset = BlockBatches(Split(source), None, READ_AHEAD_MIB)
    order = dataset.order(CONFIG, 0, 0, rank=0, world_size=1)
    sampler = ShardedBatchSampler(len(dataset), CONFIG.batch_size, CONFIG.seed, 0, order=order)
    deque(batch_loader(dataset, sampler, torch.device("cpu")), 0)


class Kind(NamedTuple):
    """Files, and two ways to read them."""

    name: str
    plain: Callable[[], Iterator[Example]]
    source: Callable[[], Blocks]


def kinds_in(folder: Path) -> list[Kind]:
    """Return what to measure."""
    texts, numbers, pictures = (folder / kind for kind in ("texts", "numbers", "pictures"))
    columns = ["x", "label"]
    return [
        Kind("texts, `decode`", lambda: plain_lines(texts, of_text), lambda: JsonLines(texts, decode=of_text)),
        Kind(
            "32 numbers, `decode`",
            lambda: plain_lines(numbers, of_numbers),
            lambda: JsonLines(numbers, decode=of_numbers),
        ),
        Kind(
            "32 numbers, `columns`",
            lambda: plain_lines(numbers, of_numbers),
            lambda: JsonLines(numbers, columns=columns),
        ),
        Kind("pictures in tar files", lambda: plain_tars(pictures, of_picture), lambda: Tars(pictures, of_picture)),
    ]


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def row_of(kind: Kind, num_rounds: int) -> str:
    """Measure a kind; return its row of the table."""
    first_s, next_s = seconds(kind.source), seconds(kind.source)
    source, rounds = kind.source(), []
    for _ in range(num_rounds):
        plain_s, blocks_s = seconds(lambda: deque(kind.plain(), 0)), seconds(lambda: read_blocks(source))
        joined_s, batches_s = seconds(lambda: join(shuffled(kind.plain()))), seconds(lambda: read_batches(source))
        rounds.append((len(source) / blocks_s, len(source) / plain_s, plain_s / blocks_s, joined_s / batches_s))
    own, plain, blocks, batches = zip(*rounds, strict=True)
    rates = f"{statistics.median(own):,.0f} / {statistics.median(plain):,.0f}"
    ratios = [f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})" for some in (blocks, batches)]
    return f"| {kind.name} | {1000 * first_s:.0f}, {1000 * next_s:.0f} | {rates} | {' | '.join(ratios)} |"


def main() -> None:
    """Measure in rounds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    allow_read_only()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        print("| | ms to open, first and again | blocks / plain loop: examples/s | ratio | ratio of batches |")
        print("|---|---|---|---|---|")
        for kind in kinds_in(Path(name)):
            print(row_of(kind, args.rounds), flush=True)


if __name__ == "__main__":
    main()
