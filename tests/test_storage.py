from pathlib import Path

import pytest
from pyarrow import fs

from mnist_ray.errors import JobError, UsageError
from mnist_ray.storage import RunFolder, locate


def test_a_file_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    run = locate(str(tmp_path), "run")
    assert not run.exists()
    assert run.read_text("a.txt") is None
    run.write_text("a.txt", "one")
    run.write_text("a.txt", "two · 2")
    assert run.read_text("a.txt") == "two · 2"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a.txt"]
    assert run.uri == f"{tmp_path}/run"


def test_home_and_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    assert locate("~/runs", "a").uri == "/home/someone/runs/a"
    assert locate("runs", "a").uri == f"{tmp_path}/runs/a"


def test_any_file_system_of_pyarrow_serves() -> None:
    filesystem, path = fs.FileSystem.from_uri("mock:///bucket")
    run = RunFolder("run", "mock:///bucket", filesystem, f"{path}/run")
    run.write_text("a.txt", "one")
    assert run.read_text("a.txt") == "one"


@pytest.mark.parametrize("path", ["nonsense://x", "ftp://"])
def test_a_bad_uri_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(UsageError, match=f"--storage-path {path} cannot be used: ") as raised:
        locate(path, "run")
    assert "\n" not in str(raised.value)


def test_an_unwritable_path_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"cannot write .*file/run/a\.txt: ") as raised:
        locate(str(tmp_path / "file"), "run").write_text("a.txt", "one")
    assert "\n" not in str(raised.value)
