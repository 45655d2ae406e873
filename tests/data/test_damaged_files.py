"""Damaged and foreign files of JSON lines and tars: each is one line that names the file and the place."""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mnist_ray.data import files, json_lines, ranges
from mnist_ray.data.sources import JsonLines, Tars
from mnist_ray.errors import UsageError
from tests.data.test_ranges import of_sample, samples_of, tarred

NOISE = np.random.default_rng(0).bytes(5000)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
LINES = b"".join(b'{"a": %d, "b": %d}\n' % (i, i) for i in range(20))
MIDDLE = 'a": 7, "b'  # of line 8

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "cut off": (LINES[:-5], ", line 20: no JSON: Expecting value at character 15$"),
    "cut off in a text": (LINES + b'{"a": "x', ", line 21: no JSON: Unterminated string"),
    "png": (PNG, ", line 1: UnicodeDecodeError: 'utf-8' codec can't decode byte 0x89 in position 0: invalid start"),
    "noise": (NOISE, ", line 1: UnicodeDecodeError: "),
    "utf-16": (LINES.decode().encode("utf-16"), ", line 1: UnicodeDecodeError: "),
    "utf-16, big": (LINES.decode().encode("utf-16-be"), ", line 1: no JSON: "),
    "byte order mark": (b"\xef\xbb\xbf" + LINES, ", line 1: no JSON: Expecting value at character 1$"),
    "compressed": (gzip.compress(LINES), ", line 1: UnicodeDecodeError: "),
    "zeros": (bytes(5000), ", line 1: no JSON: Expecting value"),
    "zeros at the end": (LINES + bytes(5000), ", line 21: no JSON: Expecting value"),
    "empty": (b"", " has no examples$"),
    "empty lines": (b"\n \r\n\n", " has no examples$"),
    "csv": (b"a,b\n1,2\n", ", line 1: no JSON: Expecting value at character 1$"),
    "html": (b"<!DOCTYPE html>\n<html></html>\n", ", line 1: no JSON: "),
    "python": (b"{'a': 1, 'b': 2}\n", ", line 1: no JSON: Expecting property name enclosed in double quotes"),
    "indented": (b'{\n  "a": 1,\n  "b": 2\n}\n', ", line 1: no JSON: "),
    "one line of all": (LINES.replace(b"\n", b" "), ", line 1: no JSON: more follows at character 17$"),
    "old mac": (LINES.replace(b"\n", b"\r"), ", line 1: no JSON: more follows"),
    "list": (b"[1, 2]\n", ", line 1: list instead of an object$"),
    "number": (b"5\n", ", line 1: int instead of an object$"),
    "text": (b'"a"\n', ", line 1: str instead of an object$"),
    "null": (b"null\n", ", line 1: NoneType instead of an object$"),
    "list in the middle": (LINES + b"[1]\n" + LINES, ", line 21: list instead of an object$"),
    "one column": (b'{"a": 1}\n', ": name at least two columns, those of the inputs, then that of the targets$"),
    "no columns": (b"{}\n", ": name at least two columns"),
    "two of one name": (LINES + b'{"a": 1, "b": 2, "a": 3}\n' + LINES, ", line 21: several columns a$"),
    "missing column": (LINES + b'{"a": 1, "c": 2}\n' + LINES, ", line 21: there is no column b, only a, c$"),
    "null in a column": (LINES + b'{"a": null, "b": 2}\n' + LINES, ", line 21: column a has nulls; pass decode="),
    "null in a list": (b'{"a": [1, null], "b": 2}\n', ", line 1: column a has nulls in its lists; pass decode="),
    "text in a column": (b'{"a": "x", "b": 2}\n', ", line 1: column a holds string, not numbers; pass decode="),
    "text among numbers": (LINES + b'{"a": "x", "b": 2}\n', ", lines 1 to 21: column a cannot be read: .*'x'"),
    "object in a column": (b'{"a": {"x": 1}, "b": 2}\n', ", line 1: column a holds objects, or too many levels"),
    "two lengths": (
        b'{"a": [1], "b": 2}\n{"a": [], "b": 2}\n',
        ", lines 1 to 2: column a has lists of different lengths",
    ),
    "two shapes": (b'{"a": [[1]], "b": 2}\n{"a": [1], "b": 2}\n', ", lines 1 to 2: column a cannot be read: "),
    "list beside a number": (b'{"a": [1], "b": 2, "c": 3}\n', ", line 1: several columns of inputs must hold a number"),
    "nan": (LINES + b'{"a": NaN, "b": 2}\n' + LINES, ", line 21: NaN is no JSON$"),
    "infinity": (LINES + b'{"a": 1, "b": -Infinity}\n' + LINES, ", line 21: -Infinity is no JSON$"),
    "huge": (LINES + b'{"a": 1e999, "b": 2}\n' + LINES, ", line 21: a number is too large$"),
    "huge for float32": (b'{"a": 1e300, "b": 1, "c": 1}\n', ", line 1: a number is too large$"),
    "huge integer": (LINES + b'{"a": 1%s, "b": 2}\n' % (b"0" * 40) + LINES, ", line 21: column a cannot be read: "),
    "endless integer": (LINES + b'{"a": 1%s, "b": 2}\n' % (b"0" * 5000) + LINES, ", line 21: "),
    "deep lists": (LINES + b'{"a": %s\n' % (b"[" * 10**5) + LINES, ", line 21: RecursionError: "),
    "deep objects": (LINES + b'{"a":' * 10**5 + b"\n" + LINES, ", line 21: RecursionError: "),
    "deep, but right": (b'{"a": %s%s, "b": 2}\n' % (b"[" * 400, b"]" * 400), ", line 1: column a holds .* levels"),
    "no utf-8": (LINES + b'{"a": "\xff", "b": 2}\n' + LINES, ", line 21: UnicodeDecodeError: .* in position 7"),
}

TAR = tarred(samples_of(range(5)))  # each sample has 2 KiB; two blocks of zeros follow


def with_member(kind: bytes = tarfile.REGTYPE, **more: Any) -> bytes:
    """Return a tar file with samples, and another member of a kind, without content."""
    content = io.BytesIO(TAR)
    with tarfile.open(fileobj=content, mode="a") as tar:
        info = tarfile.TarInfo("z.x")
        info.type = kind
        for name, value in more.items():
            setattr(info, name, value)
        tar.addfile(info)
    return content.getvalue()


def header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header that declares any size, and what looks like the end of a tar file."""
    info = tarfile.TarInfo("z.x")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


NEGATIVE = (
    "cut off.*: (it should have -[15] bytes|a header should have -65,536 bytes|neither a member nor|invalid offset)"
)
DAMAGED = " is damaged or cut off after"
BAD_TARS: dict[str, tuple[bytes, str]] = {
    "cut off in the first header": (TAR[:300], f"{DAMAGED} its start: truncated header$"),
    "cut off in a header": (
        TAR[: 4 * 1024 + 300],
        f"{DAMAGED} member a/0001.cls: neither a member nor",
    ),
    "cut off after a header": (TAR[: 4 * 1024 + 512], ", member a/0002.x is cut off: it should have 1 bytes$"),
    "cut off in a member": (
        TAR[: 4 * 1024 + 700],
        f"{DAMAGED} member a/0002.x: unexpected end of data$",
    ),
    "cut off after a member": (
        TAR[: 5 * 1024],
        f"{DAMAGED} member a/0002.x: neither a member nor the",
    ),
    "cut off before its end": (
        TAR[: 10 * 1024],
        f"{DAMAGED} member a/0004.cls: neither a member nor",
    ),
    "empty": (b"", f"{DAMAGED} its start: empty file$"),
    "no samples": (bytes(10_240), " has no examples$"),
    "png": (PNG, f"{DAMAGED} its start: "),
    "noise": (NOISE, f"{DAMAGED} its start: "),
    "utf-16": (LINES.decode().encode("utf-16"), f"{DAMAGED} its start: "),
    "compressed": (gzip.compress(TAR), f"{DAMAGED} its start: "),
    "overwritten": (TAR[:4096] + NOISE[:512] + TAR[4608:], f"{DAMAGED} member a/0001.cls: "),
    "changed header": (TAR[:4096] + b"b" + TAR[4097:], f"{DAMAGED} member a/0001.cls: "),
    "two in one": (TAR + TAR, f"{DAMAGED} member a/0004.cls: neither a member nor the end follows$"),
    "climbs out": (tarred([("../a.x", b"1")]), r", member \.\./a\.x has a name that leads out of the folder$"),
    "climbs out below": (tarred([("a/../../b.x", b"1")]), r", member a/\.\./\.\./b\.x has a name that leads out"),
    "absolute": (tarred([("/etc/a.x", b"1")]), ", member /etc/a.x has a name that leads out of the folder$"),
    "symbolic link": (with_member(tarfile.SYMTYPE, linkname="/etc/passwd"), ", member z.x is a link, a device or the"),
    "hard link": (with_member(tarfile.LNKTYPE, linkname="a/0000.x"), ", member z.x is a link, a device or the like$"),
    "device": (with_member(tarfile.BLKTYPE, devmajor=8), ", member z.x is a link, a device or the like$"),
    "terminal": (with_member(tarfile.CHRTYPE, devmajor=5), ", member z.x is a link, a device or the like$"),
    "pipe": (with_member(tarfile.FIFOTYPE), ", member z.x is a link, a device or the like$"),
    "unknown kind": (with_member(b"Z"), ", member z.x is a link, a device or the like$"),
    "sparse": (header(100, tarfile.GNUTYPE_SPARSE), ", member z.x is sparse$"),
    "sparse, pax": (
        with_member(pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "0"}),
        ", member z.x is sparse$",
    ),
    "huge": (header(2**40), ", member z.x is cut off: it should have 1,099,511,627,776 bytes$"),
    "huge name": (header(2**40, tarfile.GNUTYPE_LONGNAME), ": a header should have 1,099,511,627,776 bytes$"),
    "huge pax header": (header(2**40, tarfile.XHDTYPE), ": a header should have 1,099,511,627,776 bytes$"),
    "negative": (header(-1), NEGATIVE),
    "negative name": (header(-(2**16), tarfile.GNUTYPE_LONGNAME), NEGATIVE),
    "negative by pax": (with_member(pax_headers={"size": "-5"}), NEGATIVE),
    "endless names": (header(5, tarfile.GNUTYPE_LONGNAME)[:512] * 3000, f"{DAMAGED} its start: "),
    "without a field": (tarred([*samples_of(range(5)), ("b.x", b"1")]), ", sample b: KeyError: 'cls'$"),
    "no number": (tarred([("b.x", b"1"), ("b.cls", b"?")]), ", sample b: ValueError: invalid literal for int"),
    "in two places": (
        tarred([*samples_of(range(5)), *samples_of([0])]),
        ", sample a/0000 comes again: a sample's members must be neighbours$",
    ),
    "two of one field": (tarred([("b.x", b"1"), ("b.X", b"2"), ("b.cls", b"3")]), ", sample b has several members x$"),
    "field of the key": (tarred([("b.x", b"1"), ("b.__key__", b"2")]), ", sample b has several members __key__$"),
}

TRUNCATED = {
    ".gz": gzip.compress(LINES)[:-9],
    ".bz2": bz2.compress(LINES)[:-9],
    ".xz": lzma.compress(LINES)[:-9],
    ".zst": pa.compress(LINES, "zstd", asbytes=True)[:-9],
}


def read(folder: Path) -> None:
    """Read all files in a folder."""
    is_tar = any(".tar" in path.name for path in folder.iterdir())
    blocks = Tars(folder, of_sample) if is_tar else JsonLines(folder)
    for block in range(len(blocks.sizes)):
        blocks.read(block)


def refused(folder: Path, message: str) -> None:
    """Check that a folder's file is refused with one line, which begins with its name or its folder's."""
    with pytest.raises(UsageError, match=f"^{folder}.*{message}") as raised:
        read(folder)
    assert "\n" not in str(raised.value)
    assert "some" in str(raised.value) or "examples" in message or "at least two" in message


@pytest.mark.parametrize("name", BAD_LINES)
def test_damaged_json_lines_are_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    content, message = BAD_LINES[name]
    (tmp_path / "some.jsonl").write_bytes(content)
    refused(tmp_path, message)


@pytest.mark.parametrize("name", BAD_TARS)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_damaged_tar_is_one_line_that_names_the_place(name: str, is_compressed: bool, tmp_path: Path) -> None:
    content, message = BAD_TARS[name]
    (tmp_path / ("some.tar.gz" if is_compressed else "some.tar")).write_bytes(
        gzip.compress(content, 1) if is_compressed else content
    )
    refused(tmp_path, message)
    assert len([*tmp_path.rglob("*")]) <= 2, "nothing is extracted"


@pytest.mark.parametrize("kind", [".jsonl", ".tar"])
@pytest.mark.parametrize("end", TRUNCATED)
def test_damaged_compression_is_one_line(kind: str, end: str, tmp_path: Path) -> None:
    for content in (TRUNCATED[end], TRUNCATED[end][:7], LINES, PNG):
        (tmp_path / f"some{kind}{end}").write_bytes(content)
        refused(tmp_path, rf"some\{kind}\{end} is damaged: ")


def test_the_content_of_a_compressed_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BLOCK", 2**20)
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(LINES + b" " * 2**20))
    refused(
        tmp_path, r"some\.jsonl\.gz holds more than 1\.0 MiB, but a compressed file is read as a whole: write smaller"
    )
    (tmp_path / "some.jsonl.gz").unlink()
    (tmp_path / "some.jsonl.zst").touch()
    os.truncate(tmp_path / "some.jsonl.zst", 2**40)  # a sparse file, which is not read
    refused(tmp_path, "holds more than")


def test_a_line_of_a_gigabyte_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_MAX_LINE", 2**20)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 2**16)
    (tmp_path / "some.jsonl").write_bytes(LINES)
    os.truncate(tmp_path / "some.jsonl", 2**30)
    tracemalloc.start()
    refused(tmp_path, r", line 21 has more than 1\.0 MiB$")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_a_sample_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BLOCK", 2**16)
    (tmp_path / "some.tar").write_bytes(tarred([*samples_of(range(2)), ("b.x", bytes(2**17)), ("b.cls", b"1")]))
    refused(tmp_path, r", sample b has more than 0\.1 MiB$")


@pytest.mark.parametrize("kind", [".jsonl", ".tar"])
def test_no_files_are_one_line(kind: str, tmp_path: Path) -> None:
    source: Any = JsonLines if kind == ".jsonl" else lambda place: Tars(place, of_sample)
    for place, found in ((tmp_path, f"has no {kind} files"), (tmp_path / "missing", "missing does not exist")):
        with pytest.raises(UsageError, match=f"{re.escape(found)}$"):
            source(place)
    with pytest.raises(UsageError, match=rf"has no \{kind} files$"):
        source(f"{tmp_path}/*.x")
    (tmp_path / f"some{kind}").mkdir()
    os.mkfifo(tmp_path / f"other{kind}")
    with pytest.raises(UsageError, match=rf"has no \{kind} files$"):
        source(tmp_path)
