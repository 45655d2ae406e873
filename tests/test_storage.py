import contextlib
import dataclasses
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pyarrow import fs

from mnist_ray import storage
from mnist_ray.errors import JobError, UsageError
from mnist_ray.runs import find_run, untrusted_folders
from mnist_ray.storage import RunFolder, checkpoint_name, locate, new_name, others_can_write, position_of
from tests.conftest import close


@pytest.mark.parametrize("uri", ["", "mock:///bucket"])
def test_a_file_is_written_in_place_and_read_back_on_any_file_system(uri: str, run: RunFolder) -> None:
    if uri:
        filesystem, path = fs.FileSystem.from_uri(uri)
        run = RunFolder("run", uri, filesystem, f"{path}/run")
    assert not run.exists()
    assert run.read_text("a.txt") is None
    run.write_text("a.txt", "one")
    run.write_text("a.txt", "two · 2")
    assert run.read_text("a.txt") == "two · 2"
    run.write_text("a.txt", "photo\udcff.png")  # a file name that is not UTF-8
    assert run.read_text("a.txt") == r"photo\udcff.png"
    files = run.filesystem.get_file_info(fs.FileSelector(run.path))
    assert [file.base_name for file in files] == ["a.txt"]


def test_a_file_whose_writing_fails_stays_as_it_was(run: RunFolder) -> None:
    folder = Path(run.path)
    run.write_text("a.txt", "older")
    interrupted: Any = Mock(wraps=run.filesystem, move=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(run, filesystem=interrupted).write_text("a.txt", "one")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limit[1]))  # stands for a full disk
    try:
        with pytest.raises(JobError, match=r"^cannot write .*a\.txt: File too large$"):
            storage.write_file(folder / "a.txt", b"newer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("a.txt", "older")]


def test_a_link_in_a_run_does_not_lead_what_is_written_elsewhere(run: RunFolder, tmp_path: Path) -> None:
    own, folder, checkpoint = tmp_path / "own", Path(run.path), run.inside(checkpoint_name(1, 0))
    own.mkdir()
    (own / "keys").write_text("mine")
    folder.mkdir()
    (folder / "report.html").symlink_to(own / "keys")
    for name in ("pictures", checkpoint.name):
        (folder / name).symlink_to(own)
    run.write_text("report.html", "theirs")
    assert run.read_text("report.html") == "theirs"
    with pytest.raises(JobError, match=r"cannot write .*/pictures/keys: Too many levels of symbolic links"):
        run.write_text("pictures/keys", "theirs")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        checkpoint.write_files({"keys": [b"theirs"]})
    os.unlink(checkpoint.path)
    os.mkdir(checkpoint.path)
    (Path(checkpoint.path) / "keys").symlink_to(own / "keys")
    checkpoint.write_files({"keys": [b"theirs"]})
    assert checkpoint.read_bytes("keys") == b"theirs"
    assert (own / "keys").read_text() == "mine"
    (tmp_path / "link").symlink_to(folder)
    locate(str(tmp_path), "link").write_text("more/a.txt", "a run's folder may itself be a link")
    assert (folder / "more" / "a.txt").exists()


def test_home_and_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    assert locate("~/runs", "a").uri == "/home/someone/runs/a"
    assert locate("runs", "a").uri == f"{tmp_path}/runs/a"
    assert locate("./s3:", "run").path == f"{tmp_path}/s3:/run"


def test_the_options_of_a_uri_stay_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "?endpoint_override=http://minio:9000&region=us-east-1"
    run = RunFolder("run", f"s3://bucket/runs{options}", fs.LocalFileSystem(), "bucket/runs/run")
    assert run.inside("trials").uri == f"s3://bucket/runs/run/trials{options}"
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("mnist_ray.runs.locate", lambda path, name, given_as: asked.append((path, name)))
    find_run("s3://b/runs/one?region=a/b", "")
    assert asked == [("s3://b/runs?region=a/b", "one")]


def test_a_missing_file_is_none_or_an_error_if_required(run: RunFolder) -> None:
    assert run.read_json("config.json") is None
    with pytest.raises(JobError, match="does not exist; restore it"):
        run.require_json("config.json")
    run.write_text("config.json", '{"num_epochs": 2}')
    assert run.read_json("config.json") == run.require_json("config.json") == {"num_epochs": 2}


WHOLE: dict[str, Any] = {"checkpoint": "members/seed-0/checkpoint_epoch-001_step-000000", "seconds": {}}
DAMAGED = [
    ("config.json", b"", "Expecting value: line 1 column 1 (char 0)"),
    ("config.json", b"{\xff}", "'utf-8' codec can't decode byte 0xff"),
    ("config.json", b'{"num_epochs": 2, "st', "Unterminated string"),
    ("config.json", b"[" * 100_000, "maximum recursion depth exceeded"),
    ("config.json", b"[1]", "it is not a JSON object"),
    ("origin.json", b"{}", "it is empty"),
    ("config.json", b'{"workload": null}', "its workload is not a text"),
    ("result.json", b'{"test_loss": 0.5}', "its seconds are missing"),
    *[
        ("result.json", json.dumps({**WHOLE, "checkpoint": path}).encode(), "its checkpoint is not one of this run")
        for path in (5, "../checkpoint_epoch-001_step-000000", "members/../checkpoint_epoch-001_step-000000")
    ],
]


@pytest.mark.parametrize(("name", "content", "reason"), DAMAGED)
def test_a_damaged_file_is_one_line_with_a_remedy(run: RunFolder, name: str, content: bytes, reason: str) -> None:
    run.write_text(name, json.dumps(WHOLE))
    assert run.read_json(name) == WHOLE
    run.write_bytes(name, content)
    for read in (run.read_json, run.require_json):
        with pytest.raises(JobError) as raised:
            read(name)
        assert str(raised.value).startswith(f"{run.uri}/{name} is damaged: {reason}")
        assert str(raised.value).endswith("; restore it, or delete it")


def test_a_folder_in_a_files_place_and_a_full_storage_are_one_line_and_not_retried(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is retried"))
    for fail, message in (
        (lambda: run.read_json("report.html"), r"^cannot read .*/run/report\.html: .+$"),
        (lambda: run.write_text("report.html", "page"), r"^cannot write .*/run/report\.html: .*[Ii]s a directory.*$"),
        (locate(str(tmp_path / "file"), "run").check_writable, r"^cannot write to .*file: .+$"),
    ):
        with pytest.raises(JobError, match=message):
            fail()
    monkeypatch.setattr(RunFolder, "_write", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(JobError, match=r"^cannot write .*\.csv: No space left on device$"):
        run.write_text("steps.csv", "")


@pytest.mark.parametrize(("fails_for_s", "ends_after_s"), [(5, 5), (1e9, 30)])
def test_failed_storage_is_retried_each_second_for_half_a_minute(
    fails_for_s: float, ends_after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: sum(slept))
    monkeypatch.setattr("time.sleep", slept.append)

    def write() -> str:
        if sum(slept) < fails_for_s:
            raise OSError("the link is down")
        return "written"

    with contextlib.nullcontext() if fails_for_s < 30 else pytest.raises(OSError, match="the link is down"):
        assert storage.with_retries(write) == "written"
    assert sum(slept) == ends_after_s


def test_a_new_runs_name_has_the_time_and_32_random_bits() -> None:
    first, second = new_name("train"), new_name("train")
    assert first != second
    assert re.fullmatch(r"train_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{8}", first)


def test_checkpoints_are_folders_with_epoch_and_step_sorted_by_them(run: RunFolder, tmp_path: Path) -> None:
    strays = ["checkpoint_old", "checkpoint_epoch-009", "checkpoint_epoch-٠٠٩_step-000000", "checkpoint_manager"]
    strays += ["checkpoint_epoch-009_step-000000.bak", "copy of checkpoint_epoch-009_step-000000"]
    names = [checkpoint_name(0, 20), checkpoint_name(1, 0), checkpoint_name(1000, 0)]
    for name in (*strays, *names):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert [position_of(stray) for stray in strays] == [()] * len(strays)
    assert run.checkpoint_names() == names


def test_a_run_is_found_by_its_path_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run("/tmp/", "elsewhere").uri == "/tmp"
    assert find_run("a/b", "elsewhere").path == str(Path("a/b").absolute())
    assert find_run(".", "elsewhere").path == str(Path.cwd())
    assert find_run("my_run", str(tmp_path)).path == str(tmp_path / "my_run")
    (tmp_path / "here" / "my_run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_run("my_run", str(tmp_path)).path == str(tmp_path / "here" / "my_run")
    assert find_run("my_run/", str(tmp_path)).path == str(tmp_path / "here" / "my_run")
    (tmp_path / "my_run").mkdir()
    assert find_run("my_run", str(tmp_path)).path == str(tmp_path / "my_run")


def test_the_newest_run_is_the_last_begun_that_has_a_checkpoint_and_that_this_user_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("b_old", "a_new", "c_empty", "private")):
        run = locate(str(tmp_path), name)
        run.write_text("config.json", "{}")
        os.utime(tmp_path / name / "config.json", (number, number))
        if name != "c_empty":
            (tmp_path / name / "checkpoint_epoch-001_step-000000").mkdir()
    os.mkdir(os.fsencode(tmp_path) + b"/not utf-8 \xff")
    close(monkeypatch, "private")
    assert find_run(None, str(tmp_path)).name == "a_new"
    several = locate(str(tmp_path), "d_several")  # the checkpoints of a job of several runs are in its members' folders
    several.write_text("config.json", "{}")
    several.write_text("result.json", "{}")
    assert find_run(None, str(tmp_path)).name == "d_several"
    with pytest.raises(UsageError, match=r"no run in .* has a checkpoint to use; python jobs/train\.py makes one$"):
        find_run(None, str(tmp_path / "c_empty"))
    monkeypatch.setattr(RunFolder, "subfolders", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"--storage-path .* cannot be read: .*Permission denied"):
        find_run(None, str(tmp_path))


def test_a_run_in_the_root_of_a_file_system_ends_the_search_for_the_outermost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "exists", lambda folder, name: True)
    assert untrusted_folders(RunFolder("run", "/", fs.LocalFileSystem(), "/run"), "s3://b/runs") == [Path("/")] * 2


@pytest.mark.parametrize(
    ("find", "given", "message"),
    [
        (locate, "nonsense://x", "--storage-path nonsense://x cannot be used: "),
        (locate, "", "--storage-path is empty; name a file or a folder"),
        (locate, "s3:/KEY:SECRET@bucket", "s3:… is neither a folder nor a URI; write s3://… or ./s3:…"),
        (locate, "runs\udcff", "cannot be used: 'utf-8' codec can't encode"),
        (find_run, "", "the run's name is empty; give a name, or remove the flag"),
        (find_run, "~nosuchuser/x", "the run in ~nosuchuser: Could not determine home directory"),
        (find_run, "s3:/bucket/run", "s3:… is neither a folder nor a URI"),
    ],
)
def test_an_unusable_place_is_rejected(find: Callable[[str, str], RunFolder], given: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        find(given, "run")
    assert (message in str(raised.value), "\n" in str(raised.value)) == (True, False)


@pytest.mark.parametrize(
    ("owner", "group", "mode", "is_open"),
    [
        *[(None, None, mode, is_open) for mode, is_open in {0o755: False, 0o757: True, 0o1757: True}.items()],
        *[(12345, 0, 0o755, True), (0, 12345, 0o755, False), (0, 12345, 0o775, True), (0, 0, 0o775, False)],
    ],
)
def test_others_can_write_to_a_folder_if_its_mode_or_owner_lets_them(
    owner: int | None, group: int, mode: int, is_open: bool, tmp_path: Path
) -> None:
    tmp_path.chmod(mode)
    if owner is not None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(tmp_path, owner, group)
    assert others_can_write(tmp_path) is is_open
    assert others_can_write(tmp_path / "missing")
