import dataclasses
import math
import os
import sys
from unittest.mock import MagicMock, Mock

import pytest

from mnist_ray.report import console
from mnist_ray.report.console import RunConsole
from mnist_ray.text import clock_time
from mnist_ray.training.events import EpochFinished, Progress, Started, Validated, WorkersLost
from tests.conftest import mnist

VALUES = {"loss": 0.5, "accuracy": 0.75}
PROGRESS = Progress(1, 30, 40, [0.5, 0.25], VALUES, VALUES, 60, epoch_s=3.0, learning_rate=0.01, total_step=30)


def show_a_run(quiet: bool) -> None:
    with RunConsole(mnist(), 2, quiet=quiet) as printer:
        printer.say("data", "some")
        printer.show(Started(2, ("a", "b"), 1, "cpu", "bf16", epoch=0, step=0, total_step=0, epochs=0))
        printer.show(PROGRESS)
        printer.show(EpochFinished(PROGRESS))
        printer.show(Validated(1, {"loss": 0.5, "accuracy": 0.875}, 1.0, total_step=4))
        printer.show(WorkersLost("worker 1 died"))
        printer.show(WorkersLost("worker 0 was lost with its node"))
        printer.show(Started(2, ("a", "a"), 1, "cpu", "bf16", 0, 20, 20, 0.5, damaged=("checkpoint_b",)))
        printer.result("test", "done")


def test_without_a_stream_nothing_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    show_a_run(quiet=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a full disk at hand")
@pytest.mark.parametrize("kind", ["a full disk", "a closed pipe"])
def test_a_run_goes_on_without_its_output_and_says_so_once(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    descriptor = os.open("/dev/full", os.O_WRONLY) if kind == "a full disk" else writer
    monkeypatch.setattr("sys.stdout", open(descriptor, "w", encoding="utf-8", buffering=1))  # noqa: SIM115
    show_a_run(quiet=False)
    sys.stdout.flush()
    monkeypatch.undo()
    reason = "No space left on device" if kind == "a full disk" else "Broken pipe"
    assert capsys.readouterr().err == f"note: the output cannot be written ({reason}): continuing without it\n"


def test_a_job_log_has_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_a_run(quiet=False)
    assert capsys.readouterr().out.splitlines() == [
        "data       some",
        "started    2 × cpu with 1 thread on 2 nodes, bf16",
        "epoch 1/2  finished in 3.00 s (20 images/s): loss 0.5000, accuracy 75.00% on the training images",
        "           validation after epoch 1: loss 0.5000, accuracy 87.50% (1.0 s)",
        "lost       worker 1 died; replacing the workers …",
        "note       checkpoint_b is damaged or was cut off; using the one before it",
        "restarted  2 × cpu with 1 thread, bf16; continuing in epoch 1 after step 20; 1.0 s of work lost (10 steps)",
        "test       done",
    ]


def test_many_epochs_widen_the_labels_and_a_trained_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(mnist(), 100, quiet=False) as printer:
        printer.show(EpochFinished(dataclasses.replace(PROGRESS, epoch=60)))
        printer.show(Started(1, ("a",), 2, "cpu", "bf16", epoch=100, step=0, total_step=4000, epochs=100))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 60/100  finished in 3.00 s")
    assert second == "started       1 × cpu with 2 threads, bf16; all epochs are already trained"


def test_a_deciding_metric_that_is_nan_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(mnist(), 2, quiet=False) as printer:
        printer.show(Validated(1, {"loss": 0.5, "accuracy": math.nan}, 1.0, total_step=4))
        printer.show(Validated(2, {"loss": math.nan, "accuracy": 0.5}, 1.0, total_step=4))
    first, note, second = capsys.readouterr().out.splitlines()
    assert note == "note       accuracy is NaN: the checkpoint of epoch 1 counts as the worst"
    assert "loss 0.5000, accuracy - (" in first
    assert "loss -, accuracy 50.00% (" in second


def test_progress_is_a_plain_line_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PLAIN_INTERVAL_S", 0.0)
    with RunConsole(mnist(), 2, quiet=False) as printer:
        printer.show(dataclasses.replace(PROGRESS, so_far={"loss": 0.6, "accuracy": 0.5}))  # of the epoch
    assert capsys.readouterr().out == "epoch 1/2  30/40  loss 0.3750  accuracy 75.0%  20 images/s  0:05 left\n"


def test_quiet_prints_only_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    show_a_run(quiet=True)
    assert capsys.readouterr().out == "test       done\n"


@pytest.mark.parametrize(("seconds", "shown"), [(4.6, "0:05"), (65, "1:05"), (3600, "1:00:00"), (7384, "2:03:04")])
def test_durations_read_like_a_clock(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_texts_are_escaped_and_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(mnist(), 2, quiet=False) as printer:
        printer.say("note", "a\x1b[31m\n[red]:smile: s3://KEY:SECRET@bucket")
        printer.result("no\nte", "b\x1b[31m")
        printer.show(WorkersLost("c\r"))
    assert capsys.readouterr().out.splitlines() == [
        r"note       a\x1b[31m\n[red]:smile: s3://***@bucket",
        r"no\nte     b\x1b[31m",
        r"lost       c\r; replacing the workers …",
    ]


def test_a_notebook_with_ipywidgets_has_one_line_that_is_redrawn_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, line = Mock(), MagicMock()
    monkeypatch.setitem(sys.modules, "ipykernel", Mock())
    monkeypatch.setitem(sys.modules, "ipywidgets", Mock(__spec__=Mock(), Output=lambda: line))
    monkeypatch.setattr("IPython.display.display", shown)
    with RunConsole(mnist(), 2, quiet=False) as printer:
        printer.show(PROGRESS)
        redrawn = shown.call_args.args[0]
        printer.say("note", "a line above it")
        assert not line.close.called
    assert "epoch 1/2  30/40  loss 0.3750" in redrawn.text
    assert line.clear_output.called
    assert line.close.called
    assert capsys.readouterr().out == ""
