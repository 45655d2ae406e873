from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from mnist_ray.checkpoints.tensor_files import DamagedFileError, Rows, TensorFiles, content_of
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


def written(folder: RunFolder, world_size: int) -> TensorFiles:
    """Write LARGE in one file a rank; return what can be read."""
    digests = {}
    for rank in range(world_size):
        part: Any = Part(LARGE, rank, world_size)
        content, digests[f"{rank}.safetensors"] = content_of({"large": Rows.of(part)})
        folder.write_files({f"{rank}.safetensors": content})
    return TensorFiles(folder, digests)


def test_a_file_is_one_of_safetensors(tmp_path: Path) -> None:
    content, digest = content_of({name: Rows.of(tensor) for name, tensor in TENSORS.items()})
    found = load(b"".join(content))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    folder_at(tmp_path).write_files({"file": content})
    files = TensorFiles(folder_at(tmp_path), {"file": digest})
    read = files.read_all()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert files.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_tensor_is_read_in_the_memory_format_of_its_own(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)
    content, digest = content_of({"images": Rows.of(images)})
    folder_at(tmp_path).write_files({"file": content})
    own = torch.empty(4, 3, 8, 8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    read = TensorFiles(folder_at(tmp_path), {"file": digest}).read("images", own)
    assert torch.equal(read, images)
    assert read.stride() == own.stride()


@pytest.mark.parametrize("world_size", [1, 3, 4, 7])
def test_rows_of_all_files_make_the_whole_tensor(tmp_path: Path, world_size: int) -> None:
    assert torch.equal(written(folder_at(tmp_path), world_size).read("large"), LARGE)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (4, 3), (4, 4), (4, 8), (3, 8)])
def test_hardly_more_than_the_rows_of_a_rank_are_read(
    tmp_path: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, num_read = written(folder_at(tmp_path), before), 0
    read_range = RunFolder.read_range

    def counted(folder: RunFolder, *place: Any) -> bytes:
        nonlocal num_read
        num_read += len(content := read_range(folder, *place))
        return content

    monkeypatch.setattr(RunFolder, "read_range", counted)
    for rank in range(after):
        num_read, part = 0, Part(LARGE, rank, after)
        start = Rows.of(part).start  # type: ignore[arg-type]
        rows = files.rows("large", start, start + len(part.to_local()))
        assert torch.equal(rows, part.to_local())
        assert rows.nbytes <= num_read <= rows.nbytes + 2 * 2**15


def test_each_row_that_is_read_is_checked(tmp_path: Path) -> None:
    files = written(folder_at(tmp_path), 2)
    content = bytearray((tmp_path / "1.safetensors").read_bytes())
    content[-300 * LARGE.shape[1] * 4] ^= 1  # in the 300th row from the end
    (tmp_path / "1.safetensors").write_bytes(content)
    assert torch.equal(files.rows("large", 0, 2500), LARGE[:2500])
    assert torch.equal(files.rows("large", 2900, 3000), LARGE[2900:])
    with pytest.raises(DamagedFileError, match=r"^1\.safetensors: its digest is wrong$"):
        files.rows("large", 2690, 2710)


@pytest.mark.parametrize("kept", [[0, 2], [0, 1], [1, 2], [0, 0, 1, 2]])
def test_files_that_have_not_each_row_once_are_damaged(tmp_path: Path, kept: list[int]) -> None:
    folder, digests = folder_at(tmp_path), {}
    for number, rank in enumerate(kept):
        part: Any = Part(LARGE, rank, 3)
        content, digests[f"{number}.safetensors"] = content_of({"large": Rows.of(part)})
        folder.write_files({f"{number}.safetensors": content})
    with pytest.raises(DamagedFileError, match=r"safetensors: some rows of large are missing, or in two files$"):
        TensorFiles(folder, digests)
