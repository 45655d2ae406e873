"""JSON lines and tar files as blocks: what is read, which blocks there are, and the index that is kept of them."""

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mnist_ray.config import TrainConfig
from mnist_ray.data import files, ranges
from mnist_ray.data.batches import BlockBatches, MicroBatch, batch_loader
from mnist_ray.data.data import Blocks
from mnist_ray.data.ranges import Ranges
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.data.sources import JsonLines, Tars
from mnist_ray.errors import ExampleError, JobError, UsageError
from tests.data.test_block_batches import CONFIG, CPU, dataset_of, epochs

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def lines_of(numbers: Iterable[int]) -> bytes:
    """Return lines of 35 to 37 bytes."""
    return b"".join(b'{"id": %d, "x": [%d, 0.5], "label": %d}\n' % (i, i, i % 10) for i in numbers)


def tarred(members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar file's content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def samples_of(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Return the members of samples of 2 KiB each."""
    return [(f"a/{i:04}.{field}", b"%d" % number) for i in numbers for field, number in (("x", i), ("cls", i % 10))]


def of_object(values: dict[str, Any]) -> tuple[Any, int]:
    return np.array(values["x"]), values["label"]


def of_sample(sample: dict[str, Any]) -> tuple[int, int]:
    return int(sample["x"]), int(sample["cls"])


def examples_of(blocks: Blocks) -> list[Any]:
    return [blocks[index] for index in range(len(blocks))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for data; blocks have 1,000 bytes of JSON lines, or two samples of a tar file, or a few more."""
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that have been scanned so far."""
    names, scan = list[str](), Ranges._scan

    def noted(self: Ranges, path: str, handle: Any) -> Any:
        names.append(Path(path).name)
        return scan(self, path, handle)

    monkeypatch.setattr(Ranges, "_scan", noted)
    return names


# --- what is read


def test_a_block_has_whole_lines(small: Path) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(100)))
    blocks = JsonLines(small, columns=["id", "label"])
    assert sum(blocks.sizes) == 100
    assert len(blocks.sizes) == 4
    assert [int(number) for number, _ in examples_of(blocks)] == [*range(100)]
    assert blocks.block_names[0] == f"{small}/some.jsonl, lines 1 to {blocks.sizes[0]}"
    assert blocks.block_names[-1] == f"{small}/some.jsonl, lines {101 - blocks.sizes[-1]} to 100"


def test_a_block_has_whole_samples(small: Path) -> None:
    (small / "some.tar").write_bytes(tarred(samples_of(range(20))))
    blocks = Tars(small, of_sample)
    assert blocks.sizes == [1] * 20
    assert examples_of(blocks) == [(i, i % 10) for i in range(20)]
    assert blocks.block_names[1] == f"{small}/some.tar, members 3 to 4"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("num_bytes", [1000, 10_000, 10**6])
def test_names_of_any_length_and_any_letters_are_keys(
    small: Path, monkeypatch: pytest.MonkeyPatch, form: int, num_bytes: int
) -> None:
    monkeypatch.setattr(ranges, "BLOCK_BYTES", num_bytes)
    keys = [f"{i}/{'ä' * 300}/{i}" for i in range(30)]
    members = [(f"{key}.{field}", key.encode()) for key in keys for field in ("TXT", "seg.png")]
    (small / "some.tar").write_bytes(tarred(members, form))
    blocks = Tars(small, lambda sample: (sample["__key__"], [sample["txt"], sample["seg.png"]]))
    assert examples_of(blocks) == [(key, [key.encode()] * 2) for key in keys]


def test_members_that_belong_to_no_sample_are_passed_over(small: Path) -> None:
    some = samples_of(range(3))
    others = [("README", b"x" * 50_000), ("a/.hidden", b"x"), ("a/no_field.", b"x" * 50_000)]
    (small / "some.tar").write_bytes(tarred([*some[:2], others[0], *some[2:4], others[1], *some[4:], *others[1:]]))
    blocks = Tars(small, of_sample)
    assert examples_of(blocks) == [(i, i) for i in range(3)]
    assert [len(blocks._content_of(block)) for block in range(3)] == [2048] * 3


def test_empty_lines_are_passed_over_but_counted(small: Path) -> None:
    content = b"\n\r\n" + lines_of(range(2)) + b" \t\n" + lines_of([2]).replace(b"\n", b"\r\n") + b"\n" * 3000 + b"{"
    (small / "some.jsonl").write_bytes(content[:-1])
    blocks = JsonLines(small, decode=of_object)
    assert [label for _, label in examples_of(blocks)] == [0, 1, 2]
    (small / "some.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=r"some\.jsonl, line 3007: no JSON: Expecting property name"):
        JsonLines(small, decode=of_object)


def test_columns_become_arrays_in_the_types_of_the_first_block(small: Path) -> None:
    wide = b'{"x": [1, 2], "label": 3}\n' * 100
    (small / "some.jsonl").write_bytes(lines_of(range(100)) + wide)
    last = JsonLines(small, columns=["x", "label"]).read(6)
    assert (last.inputs.dtype, last.inputs.shape, last.targets.dtype) == (float, (len(last), 2), int)  # type: ignore[union-attr]
    several: Any = JsonLines(small / "some.jsonl", columns=["label", "label", "label"]).read(0)
    assert (several.inputs.dtype, several.inputs.shape[1:]) == (np.float32, (2,))


def test_a_number_of_another_type_than_in_the_first_block_is_refused_with_its_line(small: Path) -> None:
    for wrong in (b"2.5", b'"2"', b"true", b"[2]", b"null"):
        (small / "some.jsonl").write_bytes(lines_of(range(100)) + b'{"x": [1, 2], "label": %s}\n' % wrong)
        blocks = JsonLines(small, columns=["x", "label"])
        with pytest.raises(UsageError, match=r"some\.jsonl, line 101: column label .*; pass decode="):
            blocks.read(len(blocks.sizes) - 1)


def test_without_columns_those_of_the_first_object_are_read_and_decode_gets_all(small: Path) -> None:
    (small / "some.jsonl").write_bytes(b'{"a": 1, "b": 2}\n{"b": 4, "c": 5, "a": 3}\n')
    arrays: Any = JsonLines(small).read(0)
    assert (arrays.inputs.tolist(), arrays.targets.tolist()) == ([1, 3], [2, 4])
    assert examples_of(JsonLines(small, decode=lambda values: (len(values), 0))) == [(2, 0), (3, 0)]
    assert examples_of(JsonLines(small, columns=["b"], decode=lambda values: (values, 0)))[1] == ({"b": 4}, 0)


@pytest.mark.parametrize("end", COMPRESSIONS)
def test_a_compressed_file_is_one_block(small: Path, end: str) -> None:
    compress = COMPRESSIONS[end]
    (small / f"some.jsonl{end}").write_bytes(compress(lines_of(range(60))) + compress(lines_of(range(60, 100))))
    (small / f"some.tar{end}").write_bytes(compress(tarred(samples_of(range(20)))))
    lines, tar = JsonLines(small, columns=["id", "label"]), Tars(small, of_sample)
    assert (lines.sizes, tar.sizes) == ([100], [20])
    assert [number for number, _ in examples_of(lines)] == [*range(100)]
    assert [number for number, _ in examples_of(tar)] == [*range(20)]


@pytest.mark.parametrize(
    ("place", "number"), [("", 4), ("a-*", 2), ("a-1.jsonl", 1), ("more/*.gz", 1), ("*", 4), ("*/a-*.jsonl*", 1)]
)
def test_a_place_is_a_file_a_folder_or_a_pattern(small: Path, place: str, number: int) -> None:
    (small / "more").mkdir()
    for name in ("a-1.jsonl", "a-2.jsonl", "b.jsonl"):
        (small / name).write_bytes(lines_of([1]))
    (small / "more" / "a-3.jsonl.gz").write_bytes(gzip.compress(lines_of([1])))
    for _ in range(2):  # the second time, the pattern may match the index
        assert len(JsonLines(f"{small}/{place}", decode=of_object)) == number


def test_links_to_folders_lead_to_each_file_once(small: Path) -> None:
    (small / "in" / "more").mkdir(parents=True)
    (small / "elsewhere").mkdir()
    for number, place in enumerate(("in/a.jsonl", "in/more/b.jsonl", "elsewhere/c.jsonl")):
        (small / place).write_bytes(lines_of([number]))
    for name, target in (("again", "in"), ("back", "in/more"), ("linked", "elsewhere")):
        (small / "in" / name).symlink_to(small / target)
    assert sorted(target for _, target in examples_of(JsonLines(small / "in", decode=of_object))) == [0, 1, 2]


def test_what_spark_has_not_finished_is_passed_over(small: Path) -> None:
    for number, place in enumerate(("a.jsonl", "_temporary/0/b.jsonl", "_c.jsonl", ".d/e.jsonl")):
        (small / place).parent.mkdir(parents=True, exist_ok=True)
        (small / place).write_bytes(lines_of([number]))
    assert [target for _, target in examples_of(JsonLines(small, decode=of_object))] == [0]


def test_a_name_that_is_not_utf_8_is_one_line(small: Path) -> None:
    Path(os.fsdecode(os.fsencode(small) + b"/a\xff.jsonl")).write_bytes(lines_of([1]))
    with pytest.raises(JobError, match=r"cannot be read: the name '.*a\\udcff.jsonl' is not UTF-8; rename the file"):
        JsonLines(small, decode=of_object)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_index_of_another_user_is_not_used(small: Path, scanned: list[str]) -> None:
    (small / "a.jsonl").write_bytes(lines_of(range(9)))
    JsonLines(small, decode=of_object)
    (index,) = small.glob(".mnist_ray-*.json")
    JsonLines(small, decode=of_object)
    assert len(scanned) == 1
    os.chown(index, 12345, 12345)
    assert len(examples_of(JsonLines(small, decode=of_object))) == 9
    assert len(scanned) == 2


def test_empty_files_are_passed_over_unless_all_are_empty(small: Path) -> None:
    for name, content in (("a.jsonl", b""), ("b.jsonl", b"\n"), ("a.tar", tarred([]))):
        (small / name).write_bytes(content)
    for source in (lambda: JsonLines(small), lambda: Tars(small, of_sample)):
        with pytest.raises(UsageError, match=f"^{small} has no examples$"):
            source()
    (small / "c.jsonl").write_bytes(lines_of(range(3)))
    assert JsonLines(small, decode=of_object).sizes == [3]


# --- the index


def test_a_file_is_scanned_once_and_again_if_it_has_changed(small: Path, scanned: list[str]) -> None:
    for name in ("a", "b", "c"):
        (small / f"{name}.jsonl").write_bytes(lines_of(range(50)))
    first = JsonLines(small, decode=of_object)
    assert sorted(scanned) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    scanned.clear()
    assert JsonLines(small, decode=of_object).block_names == first.block_names
    assert scanned == []
    os.utime(small / "b.jsonl", (1, 1))
    assert JsonLines(small, decode=of_object).identity != first.identity
    assert scanned == ["b.jsonl"]
    (small / "d.jsonl").write_bytes(lines_of(range(50)))
    assert len(JsonLines(small, decode=of_object)) == 200
    assert scanned == ["b.jsonl", "d.jsonl"]
    assert sorted(path.name for path in small.iterdir() if path.name.startswith(".")) == [".mnist_ray-jsonl.json"]


def test_sources_in_one_folder_share_an_index(small: Path, scanned: list[str]) -> None:
    for split in ("train", "test"):
        (small / f"{split}.jsonl").write_bytes(lines_of(range(50)))
        (small / f"{split}.tar").write_bytes(tarred(samples_of(range(50))))
    for _ in range(2):
        for split in ("train", "test"):
            assert len(JsonLines(f"{small}/{split}*.jsonl", decode=of_object)) == 50
            assert len(Tars(f"{small}/{split}*.tar", of_sample)) == 50
    assert sorted(scanned) == ["test.jsonl", "test.tar", "train.jsonl", "train.tar"]


def test_an_index_moves_with_the_data(small: Path, scanned: list[str]) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(50)))
    before = JsonLines(small, decode=of_object).identity
    assert JsonLines(small.rename(small.parent / "moved"), decode=of_object).identity == before
    assert len(scanned) == 1


def test_files_beside_a_damaged_one_are_not_scanned_again(small: Path, scanned: list[str]) -> None:
    for name in ("a", "b", "c"):
        (small / f"{name}.jsonl").write_bytes(lines_of(range(50)))
    (small / "b.jsonl").write_bytes(b"{")
    with pytest.raises(UsageError, match=r"b\.jsonl, line 1: "):
        JsonLines(small)
    scanned.clear()
    (small / "b.jsonl").write_bytes(lines_of(range(50)))
    assert len(JsonLines(small, decode=of_object)) == 150
    assert "a.jsonl" not in scanned


def test_an_index_that_cannot_be_written_beside_the_data_is_in_the_users_cache(small: Path, scanned: list[str]) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(50)))
    (small / ".mnist_ray-jsonl.json").mkdir()
    for _ in range(2):
        assert len(JsonLines(small, decode=of_object)) == 50
    assert scanned == ["some.jsonl"]
    cache = small.parent / "cache" / "mnist_ray"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len([*cache.iterdir()]) == 1
    assert {path.name for path in small.iterdir()} == {"some.jsonl", ".mnist_ray-jsonl.json"}


def test_no_index_is_needed(small: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[str]) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(50)))
    (small / ".mnist_ray-jsonl.json").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    for _ in range(2):
        assert len(JsonLines(small, decode=of_object)) == 50
    assert len(scanned) == 2


def index_of(files: Any) -> bytes:
    """Return an index as it is written."""
    return json.dumps({"format": 1, "checksum": zlib.crc32(json.dumps(files).encode()), "files": files}).encode()


WRONG_RUNS: list[Any] = [
    [[-5, 50, 50], ["SIZE", 0, 0], [5, 0, 0]],
    [[10**30, 50, 50]],
    [["SIZE", 50, 50]],  # too large for one block
    [["SIZE", 50, 51]],
    [["SIZE", 10**15, 0]],
    [["SIZE", True, True]],
    [["SIZE", "50", "50"]],
    [["SIZE", 50.0, 50.0]],
    [["SIZE", 50]],
    [["SIZE", 50, 50, 1]],
    [[[], [], []]],
    [{}],
    [None],
    {"SIZE": 1},
    5,
    "abc",
]


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"{", b"[]", b"5", b"{}", b"\0" * 99, b"\xff\xfe", b"[" * 10**5, b'{"files": {}}', b'{"files": 5}'),
        *map(index_of, ([], {"some.jsonl": 5}, {"some.jsonl": ["VERSION"]}, {"some.jsonl": [5, []]}, {"other": []})),
        *(index_of({"some.jsonl": ["VERSION", runs]}) for runs in WRONG_RUNS),
    ],
)
def test_a_damaged_or_foreign_index_is_made_again(
    small: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[str], index: bytes
) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(50)))
    first, file = JsonLines(small, decode=of_object), small / ".mnist_ray-jsonl.json"
    right = json.loads(file.read_bytes())
    assert file.read_bytes() == index_of(right["files"])
    version, _ = right["files"]["some.jsonl"]
    monkeypatch.setattr(files, "MAX_BLOCK", 1500)
    with contextlib.suppress(ValueError, KeyError, RecursionError, TypeError):
        text = json.dumps(json.loads(index)["files"]).replace("VERSION", version)
        index = index_of(json.loads(text.replace('"SIZE"', str((small / "some.jsonl").stat().st_size))))
    file.write_bytes(index)
    assert JsonLines(small, decode=of_object).block_names == first.block_names
    assert json.loads(file.read_bytes())["files"]["some.jsonl"] == right["files"]["some.jsonl"]
    assert len(scanned) == 2


@pytest.mark.parametrize("place", range(40, 4000, 100))
def test_a_changed_byte_in_an_index_changes_no_example(small: Path, place: int) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(2000)))
    first, file = JsonLines(small, decode=of_object), small / ".mnist_ray-jsonl.json"
    index = bytearray(file.read_bytes())
    index[place % len(index)] ^= 1
    file.write_bytes(index)
    assert JsonLines(small, decode=of_object).sizes == first.sizes


@pytest.mark.parametrize(
    ("end", "shift"),
    [
        *itertools.product([".jsonl", ".tar"], [(7, 0, 0), (0, 1, 0), (0, 0, -1), (512, 0, 0), (-512, 0, 0)]),
        *itertools.product([".jsonl.gz", ".tar.gz"], [(0, 1, 0), (0, 0, -1)]),  # of one block, the size must be right
    ],
)
def test_an_index_with_wrong_numbers_is_one_line(
    small: Path, monkeypatch: pytest.MonkeyPatch, end: str, shift: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 5000)
    content = tarred(samples_of(range(300))) if end.startswith(".tar") else lines_of(range(300))
    (small / f"some{end}").write_bytes(gzip.compress(content) if end.endswith(".gz") else content)
    kind = end.removesuffix(".gz")

    def read() -> list[Any]:
        source: Blocks = JsonLines(small, decode=of_object) if kind == ".jsonl" else Tars(small, of_sample)
        return [*epochs(dataset_of(source), config=TrainConfig(num_epochs=1, batch_size=10))]

    read()
    file = small / f".mnist_ray-{kind[1:]}.json"
    files = json.loads(file.read_bytes())["files"]
    runs = files[f"some{end}"][1]
    runs[0] = [number + more for number, more in zip(runs[0], shift, strict=True)]
    runs[-1][0] -= shift[0]
    file.write_bytes(index_of(files))
    with pytest.raises(ExampleError, match=r"some\.|^train block") as raised:
        read()
    assert "\n" not in str(raised.value)


def test_a_file_that_has_changed_is_not_read(small: Path) -> None:
    (small / "some.jsonl").write_bytes(lines_of(range(50)))
    (small / "some.tar").write_bytes(tarred(samples_of(range(50))))
    for source in (JsonLines(small, decode=of_object), Tars(small, of_sample)):
        os.utime(small / f"some{source._ending}", (1, 1))
        with pytest.raises(UsageError, match=r"some\.(jsonl|tar) has changed since the data were loaded$"):
            source.read(1)


# --- the order of the examples

SOURCES: dict[str, Callable[[Path], Blocks]] = {
    "columns": lambda folder: JsonLines(folder, columns=["x", "label"]),
    "objects": lambda folder: JsonLines(folder, decode=of_object),
    "tars": lambda folder: Tars(folder, of_sample),
}


def batches(dataset: BlockBatches, rank: int, world_size: int, first_step: int) -> Iterator[MicroBatch]:
    """Yield a rank's batches of all epochs from a step on."""
    steps = CONFIG.steps_per_pass(len(dataset))
    for number in range(first_step // steps, CONFIG.num_epochs):
        order = dataset.order(CONFIG, number, first_step, rank, world_size)
        options: Any = {"rank": rank, "world_size": world_size, "first_step": max(0, first_step - number * steps)}
        sampler = ShardedBatchSampler(len(dataset), CONFIG.batch_size, CONFIG.seed, number, **options, order=order)
        yield from batch_loader(dataset, sampler, CPU)


def digests(source: bytes, world_size: int, first_step: int = 0) -> list[str]:
    """Return a digest of each step's batch, read by some ranks, which get copies of a source."""
    of_ranks = [
        [*batches(dataset_of(pickle.loads(source)), rank, world_size, first_step)] for rank in range(world_size)
    ]
    steps = []
    for parts in zip(*of_ranks, strict=True):
        digest = hashlib.sha256()
        for name in ("inputs", "targets"):
            tensors = [getattr(part, name) for part in parts if not part.is_filler]
            digest.update(b"".join(tensor.numpy().tobytes() for tensor in tensors))
        steps.append(digest.hexdigest())
    return steps


@pytest.mark.parametrize("kind", SOURCES)
def test_batches_are_the_same_for_any_number_of_ranks_and_after_any_step(
    small: Path, scanned: list[str], kind: str
) -> None:
    for number, part in enumerate(np.array_split(np.arange(243), [50, 60, 170])):
        (small / f"{number}.jsonl").write_bytes(lines_of(part.tolist()))
        (small / f"{number}.tar").write_bytes(tarred(samples_of(part.tolist())))
    source = pickle.dumps(SOURCES[kind](small))
    scanned.clear()
    whole = digests(source, 1)
    assert len({*whole}) == len(whole) == CONFIG.num_epochs * 9
    assert digests(source, 2) == digests(source, 3) == whole
    steps = np.random.default_rng(0).integers(1, len(whole), 10).tolist()
    for step, world_size in zip(steps, itertools.cycle((3, 1, 2)), strict=False):
        assert digests(source, world_size, step) == whole[step:], f"{world_size} ranks from step {step} on"
    assert scanned == [], "copies of a source have its index"
