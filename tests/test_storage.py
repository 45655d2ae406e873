import contextlib
import dataclasses
import json
import os
import re
import resource
import time
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
from mnist_ray.text import redact
from tests.conftest import close


def test_a_file_is_written_in_place_and_read_back(run: RunFolder, tmp_path: Path) -> None:
    assert not run.exists()
    assert run.read_text("a.txt") is None
    run.write_text("a.txt", "one")
    run.write_text("a.txt", "two · 2")
    assert run.read_text("a.txt") == "two · 2"
    run.write_text("a.txt", "photo\udcff.png")  # a file name that is not UTF-8
    assert run.read_text("a.txt") == r"photo\udcff.png"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a.txt"]
    assert run.uri == f"{tmp_path}/run"


def test_an_interrupt_leaves_no_half_of_a_file(run: RunFolder, tmp_path: Path) -> None:
    interrupted: Any = Mock(wraps=run.filesystem, move=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(run, filesystem=interrupted).write_text("a.txt", "one")
    assert not list((tmp_path / "run").iterdir())


def test_a_local_file_is_not_left_half_written(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_text("an older model")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limit[1]))  # stands for a full disk
    try:
        with pytest.raises(JobError, match=r"^cannot write .*model\.pt2: File too large$"):
            storage.write_file(file, b"a program")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "an older model")]


def test_a_link_in_a_run_does_not_lead_what_is_written_elsewhere(run: RunFolder, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "keys").write_text("mine")
    folder = Path(run.path)
    folder.mkdir(parents=True)
    for name in ("report.html", "report.html.tmp"):
        (folder / name).symlink_to(own / "keys")
    (folder / "pictures").symlink_to(own)
    run.write_text("report.html", "theirs")
    with pytest.raises(JobError, match=r"cannot write .*/pictures/keys: Too many levels of symbolic links"):
        run.write_text("pictures/keys", "theirs")
    assert (own / "keys").read_text() == "mine"
    assert run.read_text("report.html") == "theirs"
    (tmp_path / "link").symlink_to(folder)
    locate(str(tmp_path), "link").write_text("more/a.txt", "a run's folder may itself be a link")
    assert (folder / "more" / "a.txt").exists()


def test_a_link_does_not_lead_a_checkpoint_or_a_member_elsewhere(run: RunFolder, tmp_path: Path) -> None:
    own, checkpoint = tmp_path / "own", run.inside("checkpoint_epoch-001_step-000000")
    (Path(run.path) / "members").mkdir(parents=True)
    own.mkdir()
    (own / "keys").write_text("mine")
    Path(checkpoint.path).symlink_to(own)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        checkpoint.write_files({"keys": [b"theirs"]})
    os.unlink(checkpoint.path)
    os.mkdir(checkpoint.path)
    (Path(checkpoint.path) / "keys").symlink_to(own / "keys")
    checkpoint.write_files({"keys": [b"theirs"]})
    assert checkpoint.read_bytes("keys") == b"theirs"
    run.check_subfolders("members")
    (Path(run.path) / "members" / "seed-0").symlink_to(own)
    with pytest.raises(JobError, match=r"cannot write to .*/members: Too many levels of symbolic links"):
        run.check_subfolders("members")
    assert (own / "keys").read_text() == "mine"


def test_a_text_that_is_too_large_is_not_read(run: RunFolder) -> None:
    run.write_text("metrics.csv", "")
    os.truncate(Path(run.path) / "metrics.csv", 2**40)  # a sparse file takes no room
    with pytest.raises(JobError, match=r"cannot read .*metrics\.csv: File too large"):
        run.read_text("metrics.csv")


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


def test_any_file_system_of_pyarrow_serves() -> None:
    filesystem, path = fs.FileSystem.from_uri("mock:///bucket")
    run = RunFolder("run", "mock:///bucket", filesystem, f"{path}/run")
    run.write_text("a.txt", "one")
    assert run.read_text("a.txt") == "one"


DAMAGED = [
    (b"", "Expecting value: line 1 column 1 (char 0)"),
    (b"{\xff}", "'utf-8' codec can't decode byte 0xff"),
    (b'{"num_epochs": 2, "st', "Unterminated string"),
    (b"[" * 100_000, "maximum recursion depth exceeded"),
    (b"[1]", "it is not a JSON object"),
]


def test_a_missing_file_is_none_or_an_error_if_required(run: RunFolder) -> None:
    assert run.read_json("config.json") is None
    with pytest.raises(JobError, match="does not exist; restore it"):
        run.require_json("config.json")
    run.write_text("config.json", '{"num_epochs": 2}')
    assert run.read_json("config.json") == run.require_json("config.json") == {"num_epochs": 2}


@pytest.mark.parametrize(("content", "reason"), DAMAGED)
def test_a_damaged_file_is_one_line_with_a_remedy(run: RunFolder, tmp_path: Path, content: bytes, reason: str) -> None:
    run.write_bytes("config.json", content)
    for read in (run.read_json, run.require_json):
        with pytest.raises(JobError) as raised:
            read("config.json")
        assert str(raised.value).startswith(f"{tmp_path}/run/config.json is damaged: {reason}")
        assert str(raised.value).endswith("; restore it, or delete it")


def test_storage_errors_are_one_line_and_a_folder_in_a_files_place_is_not_retried(
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


def test_a_full_storage_is_not_retried_and_may_lack_inodes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is retried"))
    monkeypatch.setattr(RunFolder, "_write", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(JobError, match=r"^cannot write .*\.csv: No space left on device, or no inodes \(df -i\)$"):
        run.write_text("steps.csv", "")


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


def test_a_storage_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(storage: RunFolder) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RunFolder, "subfolders", refuse)
    with pytest.raises(UsageError, match=r"--storage-path .* cannot be read: .*Permission denied"):
        find_run(None, str(tmp_path))


def test_the_newest_run_is_the_last_begun_that_has_a_checkpoint(tmp_path: Path) -> None:
    for number, name in enumerate(("b_old", "a_new", "c_empty")):
        run = locate(str(tmp_path), name)
        run.write_text("config.json", "{}")
        os.utime(tmp_path / name / "config.json", (number, number))
        if name != "c_empty":
            (tmp_path / name / "checkpoint_epoch-001_step-000000").mkdir()
    assert find_run(None, str(tmp_path)).name == "a_new"
    several = locate(str(tmp_path), "d_several")  # the checkpoints of a job of several runs are in its members' folders
    several.write_text("config.json", "{}")
    several.write_text("result.json", "{}")
    assert find_run(None, str(tmp_path)).name == "d_several"
    with pytest.raises(UsageError, match=r"no run in .* has a checkpoint to use; python jobs/train\.py makes one$"):
        find_run(None, str(tmp_path / "c_empty"))


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
        (find_run, "", "the run's name is empty; give a name, or leave the flag out"),
        (find_run, "~nosuchuser/x", "the run in ~nosuchuser: Could not determine home directory"),
        (find_run, "s3:/bucket/run", "s3:… is neither a folder nor a URI"),
    ],
)
def test_an_unusable_place_is_refused(find: Callable[[str, str], RunFolder], given: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        find(given, "run")
    assert (message in str(raised.value), "\n" in str(raised.value)) == (True, False)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"workload": None}, "workload is null"),
        ("config.json", {"seed": []}, "seed is []"),
        ("origin.json", {"unused_settings": None}, "unused_settings is null"),
        ("origin.json", {"versions": None}, "versions is null"),
        ("result.json", {}, "checkpoint is missing"),
        ("result.json", {"members": None}, "members is null"),
        ("result.json", {"members": ["members/seed-" + "9" * 5000]}, 'members is ["members/seed-999'),
        ("result.json", {"formats": None}, "formats is null"),
        ("result.json", {"formats": {"test_loss": "99999999999.1f"}}, 'formats is {"test_loss": "999'),
        ("result.json", {"formats": {"test_loss": "x"}}, 'formats is {"test_loss": "x"}'),
        ("result.json", {"formats": {"test_loss": None}}, 'formats is {"test_loss": null}'),
        ("result.json", {"spread": {"test_loss": 5}}, 'spread is {"test_loss": 5}'),
        ("result.json", {"spread": {"test_loss": {"interval": "x"}}}, 'spread is {"test_loss": {"interval": "x"}'),
    ],
)
def test_a_value_of_another_kind_than_its_readers_need_is_damage(
    run: RunFolder, file: str, values: dict[str, Any], reason: str
) -> None:
    others = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}} if values else {"seconds": {}}
    run.write_text(file, json.dumps({**others, **values}))
    with pytest.raises(JobError) as raised:
        run.read_json(file)
    assert f"{file} is damaged: {reason}" in str(raised.value)


@pytest.mark.parametrize("form", ["number", "fraction", ",.3f", ".4g", ".1%", "g", ",.0f"])
def test_the_forms_of_figures_are_no_damage(run: RunFolder, form: str) -> None:
    result = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}, "formats": {"test_loss": form}}
    run.write_text("result.json", json.dumps(result))
    assert run.read_json("result.json") == result


@pytest.mark.parametrize("text", [":/" * 200_000, "?" + "key" * 100_000 + "=;", "@" + ":/" * 200_000])
def test_a_long_text_is_redacted_at_once(text: str) -> None:
    began = time.process_time()
    assert redact(text) == text
    assert time.process_time() - began < 5  # it took minutes


def test_the_newest_run_is_found_beside_folders_that_this_user_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own", "private"):
        (tmp_path / name / "checkpoint_epoch-001_step-000000").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    os.mkdir(os.fsencode(tmp_path) + b"/not utf-8 \xff")
    close(monkeypatch, "private")
    assert find_run(None, str(tmp_path)).name == "own"


@pytest.mark.parametrize(("mode", "is_open"), {0o755: False, 0o757: True, 0o1757: True}.items())
def test_others_can_write_to_a_folder_of_which_the_mode_lets_them(mode: int, is_open: bool, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    assert others_can_write(tmp_path) is is_open
    assert others_can_write(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "is_open"),
    [(12345, 0, 0o755, True), (0, 12345, 0o755, False), (0, 12345, 0o775, True), (0, 0, 0o775, False)],
)
def test_others_can_write_to_a_folder_of_another_user_or_group(
    owner: int, group: int, mode: int, is_open: bool, tmp_path: Path
) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, group)
    assert others_can_write(tmp_path) is is_open
