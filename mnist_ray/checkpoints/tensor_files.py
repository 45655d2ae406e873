"""Files of tensors in the safetensors format, written from the tensors' own memory, without a copy.

*Rows* are numbered along a tensor's first dimension; a tensor without dimensions has one row. A file holds all rows of
its tensors, or those of one worker (``--strategy fsdp``). Its header has their numbers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from mnist_ray.data.tensors import is_sharded
from mnist_ray.errors import UsageError
from mnist_ray.storage import RunFolder, with_retries

_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"},
}


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


def content_of(tensors: Mapping[str, Rows]) -> list[Any]:
    """Return a file's content, in buffers to be written one after another."""
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    buffers, offset = list[Any](), 0
    for name, rows in sorted(tensors.items(), key=lambda item: -item[1].values.itemsize):  # aligns them
        content: Any = rows.values.reshape(-1).view(torch.uint8).numpy()
        shape, stop = list(rows.values.shape), offset + len(content)
        header[name] = {"dtype": _NAMES[rows.values.dtype], "shape": shape, "data_offsets": [offset, stop]}
        places[name] = [rows.start, rows.shape]
        buffers.append(memoryview(content))
        offset = stop
    header["__metadata__"] = {"format": "pt", "rows": json.dumps(places)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *buffers]


def check_held(tensors: Mapping[str, Tensor]) -> None:
    """Raise UsageError if a file cannot hold one of these tensors."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise UsageError(f"a checkpoint cannot hold {name} ({kind}); use another type, or persistent=False")


def read_checked(folder: RunFolder, name: str, digest: str) -> bytes:
    """Return a file's content. Raises ValueError if it is missing or does not have the digest; STORAGE_ERRORS."""
    content = with_retries(functools.partial(folder.read_bytes, name))
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{name}: it is missing" if content is None else f"{name}: its digest is wrong")
    return content


def read_tensors(
    folder: RunFolder, digests: Mapping[str, str], own: Callable[[str], Tensor | None] = lambda key: None
) -> dict[str, Tensor]:
    """Return the tensors in the files of a kind, which ``digests`` names in the order of their ranks.

    One with the shape of ``own(key)`` has its memory format, and is sharded like it. Files are read one by one; of
    sharded tensors, only this rank's rows are kept. Raises like ``read_checked``.
    """
    parts, shapes, mesh = dict[str, list[Tensor]](), dict[str, tuple[int, ...]](), None
    for rank, name in enumerate(digests):
        if mesh is not None and mesh.size() == len(digests) and mesh.get_local_rank() != rank:
            continue  # as many ranks have written as read: except the first file, this rank needs only its own
        content = read_checked(folder, name, digests[name])
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        places = json.loads(header["__metadata__"]["rows"])
        for key, part in load(content).items():
            start, shapes[key] = places[key][0], tuple(places[key][1])
            like: Any = own(key)
            if like is not None and is_sharded(like) and tuple(like.shape) == shapes[key]:
                rows, mesh = Rows.of(like), like.device_mesh
                part = part[max(0, rows.start - start) : max(0, rows.stop - start)].clone()  # frees the other rows
            parts.setdefault(key, []).append(part)
    tensors = dict[str, Tensor]()
    for key, shape in shapes.items():
        of_files = parts.pop(key)  # else there would be two copies of a whole model
        values, like = torch.cat(of_files) if len(of_files) > 1 else of_files[0], own(key)
        tensors[key] = values if like is None or tuple(like.shape) != shape else _like(like, values)
    return tensors


def _like(own: Tensor, values: Tensor) -> Tensor:
    """Return the values of all rows, or of this rank's, in the memory format of ``own``, and sharded like it."""
    values = torch.empty_like(Rows.of(own).values, dtype=values.dtype, device="cpu").copy_(values)
    if not is_sharded(own):
        return values
    from torch.distributed.tensor import DTensor

    sharded: Any = own
    values = values.to(own.device)
    return DTensor.from_local(
        values, sharded.device_mesh, sharded.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def files_of(digests: Iterable[str], stem: str) -> list[str]:
    """Return the names of the files of one kind, such as ``model``, by rank: one, or one of each worker."""
    return sorted(name for name in digests if name.endswith(".safetensors") and re.split("[.-]", name)[0] == stem)


def file_name(stem: str, rank: int = 0, world_size: int = 1) -> str:
    """Return the name of a worker's file, or of the only one."""
    return f"{stem}.safetensors" if world_size == 1 else f"{stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
