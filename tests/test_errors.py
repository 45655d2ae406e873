import bdb
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from mnist_ray import cli, provenance
from mnist_ray.errors import ExampleError, JobError, UsageError, with_place
from mnist_ray.output import prepare_output, say, writing
from mnist_ray.text import command, masked, redact
from mnist_ray.workload.calls import placed
from tests.conftest import mnist


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://KEY:SECRET@bucket/runs?region=us", "s3://***@bucket/runs?region=us"),
        ("s3://KEY:SEC/RE/T@bucket/runs", "s3://***@bucket/runs"),
        ("http://user:pa@ss#w?rd@host:5000/", "http://***@host:5000/"),
        ("http:/user:password@host", "http:/***@host"),
        ("s3://b?token=a&region=us&secret_key=b", "s3://b?token=***&region=us&secret_key=***"),
        ("s3://b?endpoint_override=http://u:p@minio:9000", "s3://b?endpoint_override=http://***@minio:9000"),
        ("cannot read 's3://b?token=a': gone", "cannot read 's3://b?token=***': gone"),
        ("http://host:5000/x@y and s3://bucket/me@example.com", "http://host:5000/x@y and s3://bucket/me@example.com"),
        ("sqlite:///mlflow.db and ~/runs?key", "sqlite:///mlflow.db and ~/runs?key"),
    ],
)
def test_only_users_and_secrets_of_uris_are_masked(text: str, left: str) -> None:
    assert masked(text) == left


@pytest.mark.parametrize("text", [":/" * 200_000, "?" + "key" * 100_000 + "=;", "@" + ":/" * 200_000])
def test_a_long_text_is_masked_without_minutes_of_search(text: str) -> None:
    assert masked(text) == text


def test_control_characters_are_escaped() -> None:
    assert redact("a\x1b[31m\r\nb\x9b\x7f \u202e\udcff") == r"a\x1b[31m\r\nb\x9b\x7f \u202e\udcff"
    assert redact("7 × 8 → naïve, 日本 …") == "7 × 8 → naïve, 日本 …"


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding="ascii"))
    prepare_output()
    say("28×28 …")
    sys.stdout.flush()
    assert content.getvalue() == b"28\\xd728 \\u2026\n"


def test_the_saved_command_line_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--storage-path", "http://user:password@host", "--quiet"])
    assert provenance.origin()["command_line"] == "python train.py --storage-path 'http://***@host' --quiet"


def test_a_job_with_closed_output_works() -> None:
    code = "from mnist_ray.cli import run; from mnist_ray.output import say; run(lambda: say('done'))"
    done = subprocess.run(f'"{sys.executable}" -c "{code}" >&-', shell=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("error", "status", "start"),
    [(UsageError, 2, "error: "), (JobError, 1, "error: "), (KeyboardInterrupt, 130, ""), (OSError, 1, "OSError: ")],
)
def test_errors_are_printed_without_secrets_and_set_the_exit_status(
    error: type[BaseException], status: int, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error("s3://KEY:SECRET@bucket \x1b[31m\n")

    assert cli.status_of(main) == status
    assert capsys.readouterr().err.rstrip("\n").splitlines()[-1].startswith(rf"{start}s3://***@bucket \x1b[31m")


def full_disk() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a full disk at hand")
def test_a_command_whose_output_cannot_be_written_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", full_disk())
    assert cli.status_of(lambda: say("predicted")) == 1
    monkeypatch.undo()
    assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"


def test_who_leaves_a_debugger_interrupts_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with placed(mnist(), "create_model"):
            raise bdb.BdbQuit

    assert cli.status_of(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ExampleError("train example 5 cannot be read."), "train example 5 cannot be read"),
        (UsageError("--limit is wrong"), "--limit is wrong"),
    ],
)
def test_an_error_for_users_has_no_place_in_this_package(error: Exception, said: str) -> None:
    with pytest.raises(type(error)) as raised, writing():
        raise error
    assert with_place(raised.value, Path("/project"), fallback=Path(__file__).parent) == said


@pytest.mark.parametrize("kind", [UsageError, JobError])
def test_a_fix_follows_the_problem_also_in_an_error_that_was_sent(kind: type[UsageError]) -> None:
    assert (
        str(pickle.loads(pickle.dumps(kind("--limit is 2", fix="give less than 1"))))
        == "--limit is 2; give less than 1"
    )
    assert str(kind("--limit is 2")) == "--limit is 2"


def test_a_second_ctrl_c_keeps_the_message_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt("interrupted; to resume: …")
        finally:
            raise KeyboardInterrupt

    assert cli.status_of(main) == 130
    assert capsys.readouterr().err == "interrupted; to resume: …\n"


@pytest.mark.parametrize(
    ("running", "folder", "called"),
    [
        ("/a/project/jobs/tune.py", "/a/project", "python jobs/train.py"),
        ("/a/project/jobs/train.py", "/a/my models", "python ../project/jobs/train.py"),
        ("/a/my project/jobs/train.py", "/a", "python 'my project/jobs/train.py'"),
        ("/usr/bin/mnist-ray train", "/a", "mnist-ray train"),
        ("/usr/lib/ipykernel_launcher.py", "/a", "python jobs/train.py"),
    ],
)
def test_a_command_is_called_from_the_current_folder(
    running: str, folder: str, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [running])
    monkeypatch.setattr("os.getcwd", lambda: folder)
    assert command("train") == called
