import base64
import html
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.data.data import Split
from mnist_ray.errors import JobError
from mnist_ray.many.points import space_of
from mnist_ray.many.table import Member, Table
from mnist_ray.mnist import idx
from mnist_ray.record.history import History
from mnist_ray.report import page
from mnist_ray.report.columns import read_columns, write_columns
from mnist_ray.report.run_files import DONE, read_csv, workload_of
from mnist_ray.settings import json_lines, setting, values_of
from mnist_ray.storage import RunFolder
from mnist_ray.training.events import EpochFinished, Progress, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.figures import ACCURACY, Metric
from tests.conftest import METADATA, folder_at, mnist, run_job, run_main
from tests.many.conftest import point

PHOTOS = ["predictions", "mistakes"]
METRICS = [metric.name for metric in mnist().all_metrics]
OF_TRAINING = [*METRICS, "learning_rate"]
OF_STEPS = ["learning_rate", "gradient_norm"]
RUN_PICTURES = [*METRICS, "confusion", *PHOTOS, "learning_rate"]


class Page:
    """The content of a page: headings, images with alternative texts, table rows, and the addresses that it fetches."""

    def __init__(self, text: str) -> None:
        self.images = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]*)" alt="([^"]*)"', text)
        self.headings = list(map(html.unescape, re.findall("<h2>(.*?)</h2>", text)))
        rows = re.findall("<tr>(.*?)</tr>", text)
        self.rows = [list(map(html.unescape, re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row))) for row in rows]
        self.fetched = re.findall('(?:src|href)="(?!data:)|@import|url\\(', text)


@pytest.fixture
def unfinished_run(finished_run: Path, tmp_path: Path) -> Path:
    """The files of the finished run as an interruption in its second epoch would leave them."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    shutil.copy(finished_run / "config.json", folder)
    for name, kept in (("metrics.csv", 2), ("steps.csv", 4)):
        lines = (finished_run / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:kept]))
    return folder


@pytest.fixture
def test_images(small_data: Path) -> Split:
    return Split(idx.load("test", small_data))


def write(run: RunFolder, test: Split | None = None) -> dict[str, bytes]:
    return page.write(run, mnist(), "python jobs/train.py --resume", test)


def trial(number: int, accuracy: float) -> Member:
    figures = {"epochs": 2.0, "val_accuracy": accuracy, "val_loss": 0.1, "train_loss": 0.1}
    figures |= {"examples_per_s": 9.0, "train_s": 1.0}
    return Member(number, point(32, 0.001 * number), DONE, figures)


def table_of(*trials: Member) -> Table:
    return Table(type(mnist()), space_of(type(mnist()), {}), trials)


def test_a_run_has_one_page_with_all_its_pictures(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    images = {}
    for name, (content, alt) in zip(RUN_PICTURES, page.images, strict=True):
        images[name] = Image.open(io.BytesIO(base64.b64decode(content)))
        assert len(alt) > 15
    plots = [images[name] for name in {*RUN_PICTURES} - {*PHOTOS}]
    assert {plot.size for plot in plots} == {(720, 600)}  # side by side, they have one height
    result = json.loads((finished_run / "result.json").read_text())
    assert f"{result['test_accuracy']:.2%}" in text
    assert ["command_line", result["command_line"]] in page.rows
    assert ["batch_size", "50 (default: 128)"] in page.rows
    assert [row[0] for row in page.rows if row[-1].endswith("%")][:2] == ["data", "compute"]
    about = r"\nstarted \d{4}-\d\d-\d\d \d\d:\d\d · 49,770 parameters · 2 × cpu with 1 thread, fp32 \(.+ on .+\)<"
    assert re.search(about, text)
    assert ["ray", result["versions"]["ray"]] in page.rows


def test_the_result_has_the_forms_of_all_figures(finished_run: Path) -> None:
    formats = json.loads((finished_run / "result.json").read_text())["formats"]
    assert (formats["test_accuracy"], formats["val_loss"], formats["examples_per_s"]) == ("fraction", "number", ",.0f")
    of_files = {name for file in ("metrics.csv", "steps.csv") for name in read_csv(folder_at(finished_run), file)[0]}
    assert of_files - {"epoch", "step"} <= formats.keys()
    assert "gradient_norm" not in formats


def test_the_columns_of_predictions_agree_with_the_result(finished_run: Path, test_images: Split) -> None:
    columns, result = read_columns(folder_at(finished_run)), json.loads((finished_run / "result.json").read_text())
    np.testing.assert_array_equal(columns["label"], test_images.examples.targets)
    assert (columns["label"] == columns["prediction"]).mean() == pytest.approx(result["test_accuracy"])
    assert 0.1 <= columns["probability"].min() <= columns["probability"].max() <= 1


def test_an_interrupted_run_has_a_report(unfinished_run: Path, test_images: Split, run: RunFolder) -> None:
    run.write_text("config.json", json_lines(values_of(TrainConfig(num_epochs=2), WorkerConfig())))
    for some, test, num_epochs in ((folder_at(unfinished_run), test_images, 1), (run, None, 0)):
        assert list(write(some, test)) == OF_TRAINING * num_epochs  # none without a step
        text = some.read_text("report.html") or ""
        assert f"not finished: {num_epochs} of 2 epochs" in text
        page = Page(text)
        assert "nan" not in str(page.rows) + str([alt for _, alt in page.images])


def test_an_interrupted_sweeps_report_says_how_to_resume_the_sweep(unfinished_run: Path) -> None:
    run = folder_at(unfinished_run)
    table_of(trial(1, 0.9)).write(run)
    run.write_text("config.json", json_lines({**run.require_json("config.json"), "num_trials": 4}))
    run_main("report", str(unfinished_run))
    assert "mnist-ray tune --resume --run-name unfinished" in (unfinished_run / "report.html").read_text()


def test_the_command_writes_the_same_report_again(finished_run: Path) -> None:
    before = (finished_run / "report.html").read_text()
    done = run_job("report", str(finished_run))
    assert (done.returncode, done.stdout) == (0, f"report {finished_run}/report.html\n"), done.stderr
    assert (finished_run / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"limit": 0.002}, []),
        ({}, ["note no images are shown: the test set had 2 and now has 1,100"]),
        ({"data_dir": "/gone"}, ["no images are shown: --data-dir /gone is not a folder"]),
    ],
)
def test_a_report_written_again_shows_the_examples_that_were_predicted_or_says_why_not(
    tested_run: RunFolder,
    small_data: Path,
    changes: dict[str, Any],
    notes: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tested_run.read_json("config.json") or {}
    tested_run.write_text("config.json", json_lines({**config, "data_dir": str(small_data), **changes}))
    run_main("report", tested_run.path)
    assert capsys.readouterr().out.splitlines() == [*notes, f"report {tested_run.path}/report.html"]
    assert ("<h2>Predictions</h2>" in (tested_run.read_text("report.html") or "")) == (not notes)


def test_settings_that_differ_from_their_defaults_come_first(
    tested_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Settings:
        widths: tuple[int, ...] = setting((16, 32), "")

    workload = mnist()
    monkeypatch.setattr(type(workload), "Settings", Settings)
    train = TrainConfig(**{**workload.recipes["default"], "batch_size": 64}, ema_decay=0.5)
    tested_run.write_text("config.json", json_lines(values_of(train, WorkerConfig(num_workers=2), Settings())))
    page.write(tested_run, workload, "", None)
    written = Page(tested_run.read_text("report.html") or "")
    rows, expected = [row for row in written.rows if len(row) == 2], {"clip_grad_norm": "None", "widths": "[16, 32]"}
    differing = {"batch_size": "64 (default: 128)", "ema_decay": "0.5 (default: None)"}
    differing["num_workers"] = "2 (default: None)"
    assert rows[:3] == [[name, said] for name, said in differing.items()]
    assert written.headings[-2:] == ["Changed settings", "Other settings"]
    assert expected.items() <= dict(rows).items()


def test_a_reports_curves_do_not_jump_at_a_single_step(tested_run: RunFolder) -> None:
    steps = "".join(f"{step},{step / 400},{1 if step < 400 else 41}\n" for step in range(1, 401))  # the last one jumps
    tested_run.write_text("steps.csv", f"step,epoch,train_loss\n{steps}")
    page.write(tested_run, mnist(), "", None)
    ((_, alt), *_) = Page(tested_run.read_text("report.html") or "").images
    assert 1 < float(alt.split("training ends at ")[1].split(";")[0]) <= 1 + 40 / 10  # the last point covers 10 steps


def test_a_sweeps_report_has_its_trials_best_first_and_a_plot_for_each_setting(
    finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "sweep")
    run = folder_at(tmp_path / "sweep")
    table_of(trial(1, 0.91), trial(2, 0.92)).write(run)
    header, *rows = (run.read_text("members.csv") or "").splitlines()
    named = [f"{header},mix", *(f"{row},{text}" for row, text in zip(rows, ("a:b", "c$d"), strict=True))]
    run.write_text("members.csv", "\n".join(named))
    spaces = ["batch_size=32,64", "learning_rate=log:0.0005:0.02", "mix=a:b,c$d"]
    run.write_text("config.json", json_lines({**run.require_json("config.json"), "sweep": spaces}))
    assert list(write(run))[:3] == ["trials_batch_size", "trials_learning_rate", "trials_mix"]
    shown = Page(run.read_text("report.html") or "").rows
    names, best, other = next(shown[index : index + 3] for index, row in enumerate(shown) if row[0] == "member")
    assert (best[0], other[0]) == ("2", "1")
    cells = dict(zip(names, best, strict=True))
    assert [cells[name] for name in ("batch size", "state", "val accuracy", "test loss")] == ["32", "done", "0.92", "-"]


@pytest.fixture
def tested_run(run: RunFolder) -> RunFolder:
    """The files of a run of one epoch, tested on two images."""
    workload = mnist()
    figures = {"loss": 0.5, "accuracy": 0.5}
    history = History(run, workload, TrainConfig())
    progress = Progress(1, 9, 9, [0.5], figures, figures, 100, epoch_s=2.0, learning_rate=0.01, total_step=9)
    for event in (progress, EpochFinished(progress), Validated(1, figures, 1.0, total_step=4)):
        history.add(event)
    history.write_steps()
    columns = {name: np.array([1, 2]) for name in ("label", "prediction")} | {"probability": np.array([0.5, 1.0])}
    tested = Evaluation(({"loss": 1.0, "accuracy": 2.0},), 2, columns)
    assert write_columns(run, {"index": np.array([4, 2]), **columns}) == ""
    result = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {"total": 3.0}, "num_workers": 1}
    run.write_text("result.json", json_lines({**tested.to_dict(workload), **result, "examples_per_s": 50.0}))
    run.write_text("config.json", json_lines(values_of(TrainConfig(num_epochs=2), WorkerConfig())))
    run.write_text("origin.json", json_lines({"versions": {}, "metadata": workload.metadata}))
    return run


def test_the_columns_of_the_predictions_are_kept_whole(tested_run: RunFolder) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 4), np.uint8)
    columns = {"image": images, "is_odd": images % 2 == 1, "score": np.array([0.5, np.nan], np.float16)}
    assert write_columns(tested_run, columns) == ""
    read = read_columns(tested_run)
    assert {name: values.dtype for name, values in read.items()} == {"image": "u1", "is_odd": "?", "score": "f2"}
    assert all(np.array_equal(read[name], values, equal_nan=name == "score") for name, values in columns.items())


def test_columns_that_are_too_large_are_not_kept_and_a_note_says_so(run: RunFolder) -> None:
    large = {name: np.broadcast_to(np.float64(0), (2**10, 2**16)) for name in ("image", "mask")}
    note = write_columns(run, {"score": np.zeros(2**10), **large})
    assert note == "predictions.parquet is without image, mask: it would have more than 256 MiB"
    assert read_columns(run).keys() == {"score"}


RAGGED = (b"\xff\xfe", b"a,b\nx\n")
DAMAGED = [("members.csv", content) for content in RAGGED]
DAMAGED += [("predictions.parquet", content) for content in (b"", b"PAR1", b"PAR1\0\0\0\0PAR1", *RAGGED)]
for name in ("metrics.csv", "steps.csv", "origin.json", "result.json"):
    DAMAGED += [(name, content) for content in (b"", b"[1, 2]", *RAGGED)]
DAMAGED += [("metrics.csv", b"epoch,train_loss\n%s\n" % row) for row in (b"1,x", b",1", b"inf,1")]
DAMAGED += [("steps.csv", b"step,epoch\n1e999,1\n"), ("config.json", b"{}"), ("config.json", b'{"workload": -1}')]
DAMAGED += [("result.json", content) for content in (b"{}", b'{"checkpoint": 5, "seconds": {}}')]
DAMAGED += [("result.json", b'{"checkpoint": "../../elsewhere", "seconds": {}}')]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_a_damaged_file_of_a_run_is_one_line_with_a_remedy(tested_run: RunFolder, name: str, content: bytes) -> None:
    tested_run.write_bytes(name, content)
    with pytest.raises(JobError, match=rf"/run/{name} is damaged: .*; restore it, or delete it$"):
        page.write(tested_run, mnist(), "", None)


def test_figures_of_steps_have_a_curve_and_those_of_epochs_a_column(tested_run: RunFolder) -> None:
    history = History(tested_run, mnist(), TrainConfig(clip_grad_norm=1.0))
    values = {"loss": 0.5, "accuracy": 0.5}
    progress = Progress(2, 9, 9, [0.5], values, values, 100, 2.0, 0.01, 18, others={"gradient_norm": 3.25})
    for event in (progress, EpochFinished(progress)):
        history.add(event)
    history.write_steps()
    assert [name for name in write(tested_run) if name not in METRICS] == ["confusion", *OF_STEPS]
    text = tested_run.read_text("report.html") or ""
    assert "gradient norm over the epochs: training ends at 3.2500" in text
    (header, *rows) = [row for row in Page(text).rows if len(row) == 8 and row[0] in ("epoch", "1", "2")]
    assert header[-3:] == ["gradient norm", "seconds", "images/s"]
    assert [row[-3] for row in rows] == ["-", "3.2500"]


def test_a_metric_that_only_the_validation_has_gets_no_empty_column(
    tested_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(mnist()), "metrics", (ACCURACY, Metric("AUC", "max")))
    tested_run.write_text("metrics.csv", "epoch,train_loss,train_AUC,val_AUC\n1,0.5,,0.75\n")
    page.write(tested_run, mnist(), "", None)
    shown = (tested_run.read_text("report.html") or "").split("Epochs</h2>")[1]
    columns = re.findall('<th scope="col">(.*?)</th>', shown)
    assert columns[:4] == ["epoch", "training loss", "validation AUC", "seconds"]


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (Mock(side_effect=ValueError("no such colour")), "ValueError: no such colour"),
        (Mock(return_value=[b"png"]), "TypeError: bytes is not a mnist_ray.workload.Picture"),
    ],
)
def test_a_picture_that_cannot_be_drawn_becomes_a_note(
    tested_run: RunFolder, monkeypatch: pytest.MonkeyPatch, drawn: Any, said: str
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(type(mnist()), "pictures", drawn)
    assert list(page.write(tested_run, mnist(), "", None, notes.append)) == OF_TRAINING
    assert [note.partition(" (")[0] for note in notes] == [f"no images of the predictions: {said}"]
    assert said in (tested_run.read_text("report.html") or "")


def test_values_of_another_type_are_shown_as_missing(tested_run: RunFolder) -> None:
    result = tested_run.require_json("result.json")
    wrong = {"test_loss": "a", "seconds": {"total": "x"}, "num_test_examples": [], "examples_per_s": {}}
    tested_run.write_text("result.json", json_lines({**result, **wrong}))
    page.write(tested_run, mnist(), "", None)
    text = tested_run.read_text("report.html") or ""
    assert "tested on - images" in text
    assert re.findall(r"<dt>(test loss|seconds until tested)</dt><dd>(.*?)</dd>", text) == [
        ("test loss", "-"),
        ("seconds until tested", "-"),
    ]


def test_settings_that_the_optimizer_does_not_use_are_not_shown(tested_run: RunFolder) -> None:
    tested_run.write_text("origin.json", json_lines({"unused_settings": ["momentum"], "metadata": mnist().metadata}))
    page.write(tested_run, mnist(), "", None)
    names = {row[0] for row in Page(tested_run.read_text("report.html") or "").rows}
    assert "momentum" not in names
    assert "beta1" in names


def test_a_runs_workload_is_found_without_its_origin(tested_run: RunFolder) -> None:
    assert workload_of(tested_run, None, "runs").metadata == METADATA
    tested_run.delete_file("origin.json")
    assert workload_of(tested_run, None, "runs").metadata == {}  # which the data fill in


@pytest.mark.browser
@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_overflow_or_errors(
    finished_run: Path, width: int, colour_scheme: Any
) -> None:
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colour_scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"file://{finished_run}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
        assert loaded == [True] * len(RUN_PICTURES)
        colours = page.evaluate("(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))")
        text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (text > back) == (colour_scheme == "dark")
        browser.close()
    assert problems == []


def test_a_page_shows_no_secrets_and_escapes_markup_and_control_characters() -> None:
    command_line = "train --storage-path http://user:password@host"
    rows = [("command_line", command_line), ("data_dir", "<script>alert(1)</script>")]
    status = "To resume: s3://KEY:SECRET@bucket?token=SECRET&region=us"
    tables = [page.Table("Origin", (), [*rows, ("run", "\u202egnp.\x1b[31m")])]
    text = page.page_of(title="a run", status=status, headlines={}, notes=(), pictures=(), tables=tables)
    assert r"<td>\u202egnp.\x1b[31m</td>" in text
    assert "train --storage-path http://***@host<" in text
    assert "To resume: s3://***@bucket?token=***&amp;region=us<" in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
