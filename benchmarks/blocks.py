"""Measure how data in blocks are read from an object store: an S3 server on loopback.

    python benchmarks/blocks.py                              # 40 minutes on two cores
    python benchmarks/blocks.py --parts traffic speed        # some of the parts below

Guards streaming from an object store: each worker reads only its own blocks, the batches are the same for any number of
workers, training does not wait for the network, and memory does not grow with the data.

Writes MNIST's images as Parquet, and serves them over a link whose rate can be set. Prints, for each part:

traffic   bytes and requests of an epoch that 1, 2 and 4 workers read, and whether their batches are the same
speed     images/s of training if the link carries twice what is needed / the same images in memory, in turns
memory    a worker's memory after each epoch, of data 10 and 40 times as large as read_ahead_mib
start     seconds to the first step, of a run and of one that resumes in the middle of an epoch, also in memory
peers     the same reading with mosaicml-streaming and litdata; PEERS_PYTHON names a Python that has both
accuracy  ten seeds: all examples shuffled, blocks as MNIST lies, and blocks of MNIST sorted by class
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import psutil
import pyarrow as pa
import torch
from pyarrow import parquet as pq

from mnist_ray.config import READ_AHEAD_MIB, TrainConfig
from mnist_ray.data.batches import Batches, batch_loader, order_of
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.sources import Parquet
from mnist_ray.mnist import MNIST, idx, problem
from mnist_ray.parallel.group import Group
from mnist_ray.process import keep_freed_memory
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Data, setting

PEER = Path(__file__).parent / "peers" / "streams.py"
NUMBER = 59_900  # images
ROWS = 250  # in a row group: 80 kB, 200 kB in memory
PIXELS = 784
_FEW_MIB = 8  # a sixth of the images: what a run would have of data that are much larger than its memory


class S3(ThreadingHTTPServer):
    """Serves the files of a folder as a bucket, at most at ``mib_s``; counts requests and bytes."""

    daemon_threads = True

    def __init__(self, root: Path, mib_s: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.mib_s = root, mib_s
        self.num_requests = self.num_bytes = 0
        self._lock, self._free_at = threading.Lock(), 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find this server."""
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
        names = ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {**os.environ, **keys, "AWS_EC2_METADATA_DISABLED": "true", **dict.fromkeys(names, url)}

    def count(self, num_bytes: int) -> None:
        """Count a request."""
        with self._lock:
            self.num_requests += 1
            self.num_bytes += num_bytes

    def counted(self) -> tuple[int, int]:
        """Return the requests and bytes since the last call."""
        counts = self.num_requests, self.num_bytes
        self.num_requests = self.num_bytes = 0
        return counts

    def wait_for(self, num_bytes: int) -> None:
        """Wait until the link has carried so many more bytes."""
        if self.mib_s is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.mib_s / 2**20
            wait_s = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_s))


class Handler(BaseHTTPRequestHandler):
    """HEAD, GET with ranges, and lists."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would hold small packets back for 40 ms
    server: S3

    def log_message(self, *given: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:  # noqa: D102
        self._send(b"", head=True)

    def do_GET(self) -> None:  # noqa: D102
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self._list(query)
        else:
            self._send(b"")

    def _send(self, content: bytes, *, head: bool = False) -> None:
        file = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            self.server.count(0)
            self._answer(404, 0)
            return
        size = file.stat().st_size
        start, _, stop = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(stop or size), size - 1)
        about = {"ETag": f'"{file.stat().st_mtime_ns}"', "Last-Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}
        if head:
            self.server.count(0)
            self._answer(200, size, about)
            return
        with file.open("rb") as opened:
            opened.seek(first)
            content = opened.read(last + 1 - first)
        self.server.count(len(content))
        is_part = "Range" in self.headers
        about |= {"Content-Range": f"bytes {first}-{last}/{size}"} if is_part else {}
        self._answer(206 if is_part else 200, len(content), about)
        for place in range(0, len(content), 2**16):
            part = content[place : place + 2**16]
            self.server.wait_for(len(part))
            self.wfile.write(part)

    def _answer(self, status: int, size: int, about: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **(about or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _list(self, query: dict[str, list[str]]) -> None:
        bucket, prefix = self.server.root / urlsplit(self.path).path.strip("/"), query.get("prefix", [""])[0]
        keys = sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
        found = [key for key in keys if key.startswith(prefix)]
        below = sorted({key[: key.index("/", len(prefix)) + 1] for key in found if "/" in key[len(prefix) :]})
        direct = [key for key in found if "/" not in key[len(prefix) :] or "delimiter" not in query]
        time_of = "<LastModified>2026-11-28T00:00:00.000Z</LastModified>"
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>{(bucket / key).stat().st_size}</Size>{time_of}</Contents>"
            for key in direct
        )
        if "delimiter" in query:
            items += "".join(f"<CommonPrefixes><Prefix>{key}</Prefix></CommonPrefixes>" for key in below)
        about = f"<KeyCount>{items.count('<Key>')}</KeyCount><IsTruncated>false</IsTruncated>"
        xmlns = "http://s3.amazonaws.com/doc/2006-03-01/"
        text = f'<?xml version="1.0"?><ListBucketResult xmlns="{xmlns}">{about}{items}</ListBucketResult>'.encode()
        self.server.count(0)
        self._answer(200, len(text), {"Content-Type": "application/xml"})
        self.wfile.write(text)


def images(number: int, *, is_sorted: bool = False) -> Arrays:
    """Return MNIST's training images, repeated or cut to ``number``."""
    whole = idx.load("train")
    order = np.argsort(whole.targets, kind="stable") if is_sorted else np.arange(len(whole))
    chosen = np.resize(order, number)
    return Arrays(whole.inputs[chosen].reshape(number, PIXELS), whole.targets[chosen].astype(np.int64))


def write(file: Path, arrays: Arrays) -> None:
    """Write arrays as Parquet, in row groups of ROWS rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(arrays.inputs.ravel()), PIXELS)
    table = pa.table({"image": column, "label": arrays.targets})
    pq.write_table(table, file, row_group_size=ROWS)


def write_all(folder: Path) -> list[str]:
    """Write MNIST's training and test images as Parquet; return the flags to train on them."""
    test = idx.load("test")
    write(folder / "train.parquet", images(60_000))
    write(folder / "test.parquet", Arrays(test.inputs.reshape(-1, PIXELS), test.targets.astype(np.int64)))
    return ["--workload", f"{__file__}:Flat", "--parquet", str(folder)]


@dataclass(frozen=True, kw_only=True)
class Settings(problem.Settings):
    """MNIST's settings, and where the files are."""

    parquet: str = setting("", "folder of train.parquet and test.parquet", decides_data=True)


class Flat(MNIST):
    """MNIST whose images come as rows of 784 bytes."""

    Settings = Settings

    def load_data(self) -> Data:
        """Find the files."""
        train, test = (Parquet(f"{self.settings.parquet}/{split}.parquet") for split in ("train", "test"))
        return Data(train, test, metadata={"class_names": [*range(10)]})

    def as_picture(self, inputs: Any) -> np.ndarray:
        """Give an image its shape."""
        return np.asarray(inputs).reshape(idx.IMAGE_SHAPE)

    def prepare(self, inputs: Any, generator: Any) -> Any:
        """Give the images their shape."""
        return super().prepare(inputs.view(-1, *idx.IMAGE_SHAPE), generator)


class Meter(Callback):
    """Notes when steps end, and this process's memory after each epoch."""

    def __init__(self) -> None:
        self.started, self.first_s, self.epochs_s, self.mib = 0.0, 0.0, list[float](), list[float]()

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Start the clock."""
        self.started = self._last = time.perf_counter()

    def on_step(self, state: TrainingState) -> None:
        """Note the time to the first step."""
        self.first_s = self.first_s or time.perf_counter() - self.started

    def on_epoch(self, state: TrainingState, progress: Any) -> None:
        """Note an epoch's seconds and the memory."""
        now = time.perf_counter()
        self.epochs_s.append(now - self._last)
        self.mib.append(psutil.Process().memory_info().rss / 2**20)
        self._last = now


def train(place: str, number: int, num_epochs: int, read_ahead_mib: int, first_step: int) -> dict[str, Any]:
    """Train in this process on the Parquet files at a place, or, if it is empty, on ``number`` images in memory."""
    torch.set_num_threads(1)
    keep_freed_memory()
    workload, group, meter = Flat(metadata={"class_names": [*range(10)]}), Group(), Meter()
    config = TrainConfig(**{**MNIST.recipes["default"], "num_epochs": num_epochs, "precision": "bf16"})
    begun = time.perf_counter()
    split = Split(Parquet(place) if place else images(number))
    opened_s = time.perf_counter() - begun
    state = create_state(workload, config, len(split), group)
    state.step = first_step
    Trainer(workload, state, split, config, group, [meter], 0, read_ahead_mib).train()
    rates = [len(split) / seconds for seconds in meter.epochs_s]
    return {"open_s": opened_s, "first_s": meter.first_s, "rates": rates, "mib": meter.mib}


def read(place: str, rank: int, world_size: int, first_step: int = 0) -> dict[str, Any]:
    """Read a rank's part of an epoch; return a digest of each step's labels, in the order of the ranks."""
    dataset = Batches(Split(Parquet(place)), torch.device("cpu"), read_ahead_mib=_FEW_MIB)
    begun, config = time.perf_counter(), TrainConfig(num_epochs=1, batch_size=128)
    dataset.read_ahead(config, first_step, rank, world_size)
    order = order_of(dataset.split, config, 0)
    options: Any = {"rank": rank, "world_size": world_size, "first_step": first_step, "order": order}
    sampler = ShardedBatchSampler(len(dataset), config.batch_size, config.seed, 0, **options)
    sums, first_s = [], 0.0
    for batch in batch_loader(dataset, sampler, torch.device("cpu")):
        first_s = first_s or time.perf_counter() - begun
        digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:8] for image in batch.inputs]
        sums.append([] if batch.is_filler else digests)
    return {"first_s": first_s, "images": sum(map(len, sums)), "seconds": time.perf_counter() - begun, "steps": sums}


def call(environment: dict[str, str], function: str, *given: object) -> subprocess.Popen[str]:
    """Start a process of this file that calls a function and prints what it returns."""
    command = [sys.executable, __file__, "--call", json.dumps([function, *given])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    """Return what a process has printed."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("a process has failed; see above")
    return json.loads(out.splitlines()[-1])


def traffic(folder: Path) -> None:
    """Print what 1, 2 and 4 workers fetch in an epoch."""
    write(folder / "bucket" / "train" / "a.parquet", images(NUMBER))
    size = (folder / "bucket" / "train" / "a.parquet").stat().st_size
    server, num_blocks = S3(folder), NUMBER / ROWS
    whole: list[list[str]] = []
    answer(call(server.environment, "read", "s3://bucket/train", 0, 1, 10**6))  # reads only the footers
    num_opening, _ = server.counted()
    print("| workers | bytes fetched / of the data | requests for each block | the same batches |\n|---|---|---|---|")
    for world_size in (1, 2, 4):
        server.counted()
        ranks = [call(server.environment, "read", "s3://bucket/train", rank, world_size) for rank in range(world_size)]
        answers = [answer(rank)["steps"] for rank in ranks]
        num_requests, num_bytes = server.counted()
        steps = [[image for part in parts for image in part] for parts in zip(*answers, strict=True)]
        whole = whole or steps
        each, is_same = (num_requests - world_size * num_opening) / num_blocks, "yes" if steps == whole else "NO"
        print(f"| {world_size} | {num_bytes / size:.3f} | {each:.2f} | {is_same} |", flush=True)


def speed(folder: Path) -> None:
    """Print the ratio of images/s from the server, with little memory, and from memory, in five rounds."""
    number = 4 * NUMBER
    file = folder / "bucket" / "train" / "a.parquet"
    write(file, images(number))

    def rate_of(place: str, environment: dict[str, str]) -> float:
        done = answer(call(environment, "train", place, number, 1, 32, 0))
        return float(done["rates"][0])

    needed = rate_of("", {**os.environ}) * file.stat().st_size / number / 2**20
    server = S3(folder, 2 * needed)
    ratios, rates = [], []
    for _ in range(5):
        in_memory, in_blocks = rate_of("", {**os.environ}), rate_of("s3://bucket/train", server.environment)
        ratios.append(in_blocks / in_memory)
        rates.append((in_blocks, in_memory))
    some = ", ".join(f"{one:,.0f} / {other:,.0f}" for one, other in rates)
    print(f"link {2 * needed:.1f} MiB/s; images/s from the server / in memory: {some}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def memory(folder: Path) -> None:
    """Print a worker's memory after each epoch, of data 10 and 40 times as large as the read-ahead."""
    read_ahead_mib = 8
    print("| data / read_ahead_mib | MiB after epochs 1, 2, 3 |\n|---|---|")
    for times in (10, 40):
        number = times * read_ahead_mib * 2**20 // PIXELS
        write(folder / "bucket" / f"{times}" / "a.parquet", images(number))
        done = answer(call(S3(folder).environment, "train", f"s3://bucket/{times}", number, 3, read_ahead_mib, 0))
        print(f"| {times} | {', '.join(f'{mib:.0f}' for mib in done['mib'])} |", flush=True)


def start(folder: Path) -> None:
    """Print the seconds to the first step, in memory and from a server, of a run and of a resumed one."""
    write(folder / "bucket" / "train" / "a.parquet", images(NUMBER))
    server = S3(folder, 8.0)
    print("| | in memory | from the server at 8 MiB/s |\n|---|---|---|")
    for name, first_step in (("a run", 0), ("resumed in the middle of an epoch", 235)):
        cells = []
        for place in ("", "s3://bucket/train"):
            given = "train", place, NUMBER, 1, READ_AHEAD_MIB, first_step
            done = [answer(call(server.environment, *given)) for _ in range(3)]
            cells.append(f"{statistics.median(each['open_s'] + each['first_s'] for each in done):.2f}")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


def peers(folder: Path) -> None:
    """Print how fast this package and others read the same images, and what 1, 2 and 4 workers fetch."""
    arrays, server = images(NUMBER), S3(folder)
    np.savez(folder / "images.npz", inputs=arrays.inputs, targets=arrays.targets)
    write(folder / "bucket" / "mnist_ray" / "a.parquet", arrays)
    own = [sys.executable, __file__, "--call"]
    print("| | images/s, 1 worker | first batch, s | after a kill, s | bytes of 1, 2, 4 workers | the same batches |")
    print("|---|---|---|---|---|---|")
    for kind in ("mnist_ray", "mosaicml-streaming", "litdata"):
        bucket, other = folder / "bucket" / kind, [os.environ["PEERS_PYTHON"], str(PEER)]
        if kind != "mnist_ray":
            subprocess.run([*other, "write", kind, folder / "images.npz", bucket], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in bucket.rglob("*"))

        def answers(world_size: int, steps_done: int = 0, kind: str = kind, other: list[str] = other) -> list[Any]:
            ranks = []
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                for rank in range(world_size):
                    numbers = {"RANK": rank, "GLOBAL_RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": 29511}
                    numbers |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "NNODES": 1}
                    environment = {**server.environment, **{name: str(value) for name, value in numbers.items()}}
                    environment["MASTER_ADDR"] = "127.0.0.1"
                    place = f"s3://bucket/{kind}"
                    command = [*other, "read", kind, place, f"{cache}/cache", str(steps_done)]
                    if kind == "mnist_ray":
                        command = [*own, json.dumps(["read", place, rank, world_size, steps_done])]
                    ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
                return [answer(rank) for rank in ranks]

        fetched, batches, alone = [], [], list[Any]()
        for world_size in (1, 2, 4):
            server.counted()
            of_ranks = answers(world_size)
            fetched.append(server.counted()[1] / size)
            steps = zip(*(each["steps"] for each in of_ranks), strict=False)
            batches.append([sorted(image for part in parts for image in part) for parts in steps])
            alone = alone or of_ranks
        (one,) = alone
        rate = one["images"] / (one["seconds"] - one["first_s"])
        resumed = answers(1, 100)[0]["first_s"]
        each, is_same = ", ".join(f"{some:.2f}" for some in fetched), all(some == batches[0] for some in batches)
        cells = f"{rate:,.0f} | {one['first_s']:.2f} | {resumed:.2f} | {each} | {'yes' if is_same else 'no'}"
        print(f"| {kind} | {cells} |", flush=True)


def accuracy(folder: Path) -> None:
    """Print the mean test accuracy of ten seeds, shuffled as a whole and in blocks."""
    keep_freed_memory()
    loaded = idx.load("test")
    test = Arrays(loaded.inputs.reshape(-1, PIXELS), loaded.targets)
    workload, group = Flat(metadata={"class_names": [*range(10)]}), Group()
    print("| examples | mean | seeds 0 to 9 |\n|---|---|---|")
    for name in ("shuffled as a whole", "blocks as they lie", "blocks sorted by class"):
        arrays = images(60_000, is_sorted=name.endswith("class"))
        if name.startswith("blocks"):
            write(folder / f"{name}.parquet", arrays)
        split = Split(Parquet(folder / f"{name}.parquet") if name.startswith("blocks") else arrays)
        accuracies = []
        for seed in range(10):
            config = TrainConfig(**MNIST.recipes["default"], precision="bf16", seed=seed)
            state = create_state(workload, config, len(split), group)
            Trainer(workload, state, split, config, group).train()
            tested = evaluate(workload, state.model, Split(test), config)
            accuracies.append(tested.values(workload)["accuracy"])
        each = ", ".join(f"{100 * one:.2f}" for one in accuracies)
        print(f"| {name} | {statistics.mean(accuracies):.2%} | {each} |", flush=True)


def main() -> None:
    """Print the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (traffic, speed, memory, start, peers, accuracy)}
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, *given = json.loads(args.call)
        print(json.dumps(read(*given) if function == "read" else train(*given)))
        return
    for part in args.parts:
        print(f"\n{part}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            parts[part](Path(folder))


if __name__ == "__main__":
    main()
