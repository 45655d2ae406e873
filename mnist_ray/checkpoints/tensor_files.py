"""Files of tensors in the safetensors format. Any rows can be read and checked on their own.

*Rows* are numbered along a tensor's first dimension; a tensor without dimensions has one row. A file holds all rows of
its tensors, or those of one worker (``--strategy fsdp``). Its header has their numbers, and a digest of every few rows.
Files are written from the tensors' own memory, without a copy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnist_ray.data.tensors import is_sharded
from mnist_ray.errors import UsageError, first_line
from mnist_ray.storage import STORAGE_ERRORS, RunFolder, with_retries

_DIGESTED_BYTES = 2**15  # per digest, about; reading rows reads up to that many more bytes at each end
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedFileError(ValueError):
    """A file is missing, cut off, or not the one that was written."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor."""

    values: Tensor  # the rows, on any device
    start: int  # number of the first one in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Return all rows of a tensor or, of a ``DTensor`` that is sharded by rows, those that this rank holds.

        If a ``DTensor`` is not sharded by rows, all ranks must call this.
        """
        shape = tuple(tensor.shape)
        if not is_sharded(tensor):
            return cls(tensor.detach(), 0, shape)
        sharded: Any = tensor.detach()
        if not sharded.placements[0].is_shard(0):
            return cls(sharded.full_tensor(), 0, shape)
        mesh = sharded.device_mesh
        start = min(shape[0], math.ceil(shape[0] / mesh.size()) * mesh.get_local_rank())  # as torch.chunk divides
        return cls(sharded.to_local(), start, shape)

    @property
    def stop(self) -> int:
        """The number of the row after the last one."""
        return self.start + (len(self.values) if self.shape else 1)

    def copied(self) -> Rows:
        """Return a copy in main memory, in the order of the rows, whatever the tensor's memory format."""
        copy = torch.empty(self.values.shape, dtype=self.values.dtype).copy_(self.values)
        return Rows(copy, self.start, self.shape)


def content_of(tensors: Mapping[str, Rows]) -> tuple[list[Any], str]:
    """Return a file's content, in buffers to be written one after another, and the SHA-256 of its header."""
    header: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    buffers, offset = list[Any](), 0
    for name, rows in sorted(tensors.items(), key=lambda item: -item[1].values.itemsize):  # aligns them
        content = _bytes_of(rows.values.reshape(-1))
        digested_rows = max(1, _DIGESTED_BYTES // (row_bytes(rows.shape, rows.values.dtype) or 1))
        digests = _digests(content, digested_rows * row_bytes(rows.shape, rows.values.dtype))
        entries[name] = [rows.start, rows.shape, digested_rows, digests]
        shape, stop = list(rows.values.shape), offset + len(content)
        header[name] = {"dtype": _NAMES[rows.values.dtype], "shape": shape, "data_offsets": [offset, stop]}
        buffers.append(content)
        offset = stop
    header["__metadata__"] = {"format": "pt", "rows": json.dumps(entries)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *buffers], hashlib.sha256(text).hexdigest()


def check_held(tensors: Mapping[str, Tensor]) -> None:
    """Raise UsageError if a file cannot hold one of these tensors."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise UsageError(f"a checkpoint cannot hold {name} ({kind}); use another type, or persistent=False")


def _bytes_of(values: Tensor) -> memoryview:
    """Return the memory of a tensor with one dimension."""
    buffer: Any = values.view(torch.uint8).numpy()
    return memoryview(buffer)


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size of a tensor's row."""
    return math.prod(shape[1:]) * dtype.itemsize


def _digests(content: memoryview, size: int) -> list[str]:
    """Return the digest of every ``size`` bytes."""
    return [hashlib.sha256(content[at : at + size]).hexdigest()[:32] for at in range(0, len(content), size or 1)]


@dataclass(frozen=True)
class _Part:
    """The rows of a tensor that are in one file."""

    file_name: str
    offset: int  # of the first row, in bytes
    rows: range  # their numbers
    row_bytes: int
    digested_rows: int  # for each digest
    digests: list[str]

    def read(self, folder: RunFolder, start: int, stop: int) -> memoryview:
        """Return the bytes of rows, which this part must have. Raises DamagedFileError and STORAGE_ERRORS."""
        first = (start - self.rows.start) // self.digested_rows
        last = math.ceil((stop - self.rows.start) / self.digested_rows)
        digested = self.rows[first * self.digested_rows : last * self.digested_rows]  # by whole digests
        position = self.offset + (digested.start - self.rows.start) * self.row_bytes
        content = _read_range(folder, self.file_name, position, len(digested) * self.row_bytes)
        if _digests(content, self.digested_rows * self.row_bytes) != self.digests[first:last]:
            raise DamagedFileError(f"{self.file_name}: its digest is wrong")
        begin = (start - digested.start) * self.row_bytes
        return content[begin : begin + (stop - start) * self.row_bytes]


def _read_range(folder: RunFolder, file_name: str, start: int, size: int) -> memoryview:
    return memoryview(with_retries(functools.partial(folder.read_range, file_name, start, size)))


class TensorFiles:
    """Tensors in one or several files of a folder."""

    def __init__(self, folder: RunFolder, digests: Mapping[str, str]) -> None:
        """Read the files' headers; ``digests`` are those that ``content_of`` returned. Raises like ``read``."""
        self._folder = folder
        self._parts: dict[str, list[_Part]] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file_name, digest in digests.items():
            try:
                found = list(self._parts_in(file_name, digest))
            except (MemoryError, *STORAGE_ERRORS):
                raise
            except Exception as error:  # a file that another program has written may raise anything
                raise DamagedFileError(f"{file_name}: {first_line(error)}") from error
            for name, shape, dtype, part in found:
                if self._tensors.setdefault(name, (shape, dtype)) != (shape, dtype):
                    raise DamagedFileError(f"{file_name}: {name} has another shape or type than in another file")
                self._parts.setdefault(name, []).append(part)
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part.rows.start)
            num_rows = (*self._tensors[name][0], 1)[0]
            if [*(part.rows.start for part in parts), num_rows] != [0, *(part.rows.stop for part in parts)]:
                raise DamagedFileError(f"{parts[0].file_name}: some rows of {name} are missing, or in two files")

    def _parts_in(self, file_name: str, digest: str) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, _Part]]:
        file_size = self._folder.info(file_name).size
        if file_size is None:
            raise DamagedFileError("it is missing")
        length = int.from_bytes(_read_range(self._folder, file_name, 0, 8), "little")
        text = _read_range(self._folder, file_name, 8, length)
        if hashlib.sha256(text).hexdigest() != digest:
            raise DamagedFileError("its digest is wrong")
        header, offset = json.loads(bytes(text)), 8 + length
        for name, (start, shape, digested_rows, digests) in json.loads(header.pop("__metadata__")["rows"]).items():
            entry, shape = header[name], tuple(shape)
            dtype, stop = _DTYPES[entry["dtype"]], start + (entry["shape"][0] if shape else 1)
            numbers = (*shape, start, stop - start, digested_rows - 1)
            is_number = all(isinstance(number, int) and number >= 0 for number in numbers)
            if not is_number or math.prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63:  # torch's limit
                raise DamagedFileError(f"{name} has no such rows")
            part = _Part(file_name, offset, range(start, stop), row_bytes(shape, dtype), digested_rows, list(digests))
            offset += (stop - start) * part.row_bytes
            yield name, shape, dtype, part
        if offset != file_size:
            raise DamagedFileError(f"it has {file_size:,} bytes, but its tensors {offset:,}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole tensors."""
        return {name: shape for name, (shape, _) in self._tensors.items()}

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._tensors.values())

    def read(self, name: str, own: Tensor | None = None) -> Tensor:
        """Return a tensor; if ``own`` has its shape, in the memory format of ``own``, and sharded like it.

        Only this rank's rows of a sharded tensor are read. Raises DamagedFileError and STORAGE_ERRORS.
        """
        shape, dtype = self._tensors[name]
        if own is None or tuple(own.shape) != shape:
            return self.rows(name, 0, shape[0] if shape else 1)
        rows = Rows.of(own)
        values = torch.empty_like(rows.values, dtype=dtype, device="cpu").copy_(self.rows(name, rows.start, rows.stop))
        if not is_sharded(own):
            return values
        from torch.distributed.tensor import DTensor

        sharded: Any = own
        values = values.to(own.device)
        return DTensor.from_local(
            values, sharded.device_mesh, sharded.placements, run_check=False, shape=own.shape, stride=own.stride()
        )

    def read_all(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return all tensors, each like the one of ``own`` with the same name. Raises like ``read``."""
        return {name: self.read(name, (own or {}).get(name)) for name in self}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor. Raises like ``read``."""
        shape, dtype = self._tensors[name]
        values = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=dtype)
        content = _bytes_of(values.view(-1))
        for part in self._parts[name]:
            first, last = max(start, part.rows.start), min(stop, part.rows.stop)
            if first < last and part.row_bytes:
                begin, end = (first - start) * part.row_bytes, (last - start) * part.row_bytes
                content[begin:end] = part.read(self._folder, first, last)
        return values


def files_of(digests: Iterable[str], stem: str) -> list[str]:
    """Return the names of the files of one kind, such as ``model``: one, or one of each worker."""
    return [name for name in digests if name.endswith(".safetensors") and name.split(".")[0].split("-")[0] == stem]


def file_name(stem: str, rank: int = 0, world_size: int = 1) -> str:
    """Return the name of a worker's file, or of the only one."""
    return f"{stem}.safetensors" if world_size == 1 else f"{stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
