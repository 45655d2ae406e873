from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mnist_ray.checkpoints import tensor_files
from mnist_ray.checkpoints.tensor_files import Rows, content_of, read_checked, read_tensors
from mnist_ray.storage import RunFolder
from tests.conftest import folder_at

LARGE = torch.arange(3000 * 100, dtype=torch.float32).reshape(3000, 100)  # 1.2 MB
TENSORS = {
    "large": LARGE,
    "bf16": torch.randn(5, 3).bfloat16(),
    "truth": torch.tensor([True, False, True]),
    "complex": torch.randn(4, 2, dtype=torch.complex64),
    "number": torch.tensor(7),
    "none": torch.empty(0, 4),
    "wide": torch.randn(2, 50_000),
}


class Part:
    """A tensor like a ``DTensor``: this rank holds some of its rows."""

    def __init__(self, whole: torch.Tensor, rank: int, world_size: int) -> None:
        self.shape, self._rows = whole.shape, whole.chunk(world_size)[rank]
        self.placements, self.device_mesh = [self], self
        self.size, self.get_local_rank = lambda: world_size, lambda: rank

    def detach(self) -> Part:
        return self

    def is_shard(self, dim: int) -> bool:
        return dim == 0

    def to_local(self) -> torch.Tensor:
        return self._rows


def written(folder: RunFolder, tensors: dict[str, Any], name: str = "file") -> dict[str, str]:
    """Write a file of tensors; return its digest by its name."""
    content = content_of({key: Rows.of(tensor) for key, tensor in tensors.items()})
    folder.write_files({name: content})
    return {name: hashlib.sha256(b"".join(content)).hexdigest()}


def test_a_file_is_one_of_safetensors(tmp_path: Path) -> None:
    digests = written(folder_at(tmp_path), TENSORS)
    for found in (load_file(tmp_path / "file"), read_tensors(folder_at(tmp_path), digests)):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())
        assert all(found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())


def test_a_tensor_is_read_in_the_memory_format_of_its_own(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)
    own = torch.empty(4, 3, 8, 8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    read = read_tensors(folder_at(tmp_path), written(folder_at(tmp_path), {"images": images}), lambda key: own)
    assert torch.equal(read["images"], images)
    assert read["images"].stride() == own.stride()


@pytest.mark.parametrize("before", [1, 2, 3, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_each_rank_reads_its_rows_of_files_that_any_number_of_ranks_wrote(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digests, read = folder_at(tmp_path), dict[str, str](), list[str]()
    for rank in range(before):
        digests |= written(folder, {"large": Part(LARGE, rank, before)}, f"{rank}.safetensors")
    assert torch.equal(read_tensors(folder, digests)["large"], LARGE)
    monkeypatch.setattr(tensor_files, "_like", lambda own, values: values)  # a DTensor needs a group of processes
    for rank in range(after):
        part: Any = Part(LARGE, rank, after)
        assert torch.equal(read_tensors(folder, digests, {"large": part}.get)["large"], part.to_local())

    def noted(folder: RunFolder, name: str, digest: str) -> bytes:
        read.append(name)
        return read_checked(folder, name, digest)

    monkeypatch.setattr(tensor_files, "read_checked", noted)
    read_tensors(folder, digests, {"large": part}.get)
    others = [f"{rank}.safetensors" for rank in range(1, before)]
    assert read == ["0.safetensors", *(others[-1:] if before == after else others)]
