"""examples/serve.py on a real Ray Serve: what it answers, what it rejects, and a new run that takes over."""

import importlib
import io
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

import mnist_ray
from mnist_ray.data.data import Arrays
from tests.conftest import ROOT, as_flags, run_main

pytestmark = pytest.mark.processes

example: Any = importlib.import_module("examples.serve")


def picture(pixels: np.ndarray | None = None, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((30, 30), np.uint8) if pixels is None else pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def deployed(finished_run: Path) -> Iterator[str]:
    """The address at which the finished run is served."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    serve.run(example.app({"run": str(finished_run), "port": port}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_files_and_json_get_the_predictions_of_predict(deployed: str, finished_run: Path, mnist_test: Arrays) -> None:
    digits = [255 - mnist_test.inputs[index] for index in range(20)]
    files = [("file", (f"{index}.png", picture(digit))) for index, digit in enumerate(digits)]
    expected = mnist_ray.predict([Image.fromarray(digit) for digit in digits], finished_run)
    answers = [
        httpx.post(f"{deployed}/predict", files=files).json(),
        httpx.post(f"{deployed}/predict", json={"inputs": mnist_test.inputs[:20].tolist()}).json(),
    ]
    for answer, places in zip(answers, ("{}.png", "inputs[{}]"), strict=True):
        assert answer["run"].startswith("two/checkpoint_")
        assert answer["predictions"] == [
            {**prediction.to_dict(0.8), "file": places.format(index)} for index, prediction in enumerate(expected)
        ]


JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}
REJECTED = {
    "nothing": (b"", {}, 415),
    "empty JSON": (b"", JSON, 400),
    "deep JSON": (b"[" * 10**6, JSON, 400),
    "deep objects": (b'{"inputs": [%s1%s]}' % (b'{"a": ' * 900, b"}" * 900), JSON, 422),
    "no inputs": (b'{"inputs": []}', JSON, 422),
    "NaN": (b'{"inputs": [[NaN]]}', JSON, 422),
    "too large for 32 bits": (b'{"inputs": [[1e300]]}', JSON, 422),
    "another shape": (b'{"inputs": [[1, 2, 3]]}', JSON, 422),
    "too many numbers": (json.dumps({"inputs": [[0] * 20_000]}).encode(), JSON, 422),
    "no form": (b"seven", FORM, 400),
    "too large": (b" " * (8 * 2**20 + 1), JSON, 413),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_wrong_request_is_rejected_in_one_line(deployed: str, case: str) -> None:
    content, headers, status = REJECTED[case]
    answer = httpx.post(f"{deployed}/predict", content=content, headers=headers)
    assert (answer.status_code, "\n" in answer.text) == (status, False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image in a known format"),
        (b"PK\x03\x04" + bytes(1000), "not an image in a known format"),
        (picture(np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8))[:900], "cannot be read: "),
    ],
    ids=["empty", "zip", "truncated"],
)
def test_a_file_that_is_no_picture_is_named(deployed: str, content: bytes, reason: str) -> None:
    files = [("file", ("good.png", picture())), ("file", ("bad.png", content))]
    answer = httpx.post(f"{deployed}/predict", files=files)
    assert answer.status_code == 422
    assert re.fullmatch(f"bad.png: .*{reason}.*", answer.json()["detail"])


def test_a_wrong_input_does_not_harm_the_others_of_its_batch(deployed: str, mnist_test: Arrays) -> None:
    good, statuses = {"inputs": mnist_test.inputs[:8].tolist()}, []

    def send(body: Any) -> None:
        statuses.append((body is good, httpx.post(f"{deployed}/predict", json=body).status_code))

    threads = [threading.Thread(target=send, args=(good if n % 2 else {"inputs": [[1]] * 8},)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [(False, 422)] * 8 + [(True, 200)] * 8


def test_a_new_run_takes_over_while_every_request_is_answered(
    deployed: str, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "next")
    answers, is_over = list[Any](), threading.Event()

    def ask() -> None:
        with httpx.Client() as client:
            while not is_over.is_set():
                answers.append(client.post(f"{deployed}/predict", files={"file": picture()}))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        serve.run(example.app({"run": str(tmp_path / "next")}))
    finally:
        is_over.set()
        asking.join()
    assert {answer.status_code for answer in answers} == {200}
    runs = [answer.json()["run"].split("/")[0] for answer in answers]
    assert {*runs} == {"two", "next"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "none"}, ".*/none is neither a checkpoint nor a run with a checkpoint"),
        ({"runs": "none"}, "runs=none: Extra inputs are not permitted"),
        ({"port": "http"}, "port=http: Input should be a valid integer, .*"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=f"^{message}$"):
        example.app({"storage_path": str(tmp_path), **arguments})


STROKES = {
    "3": [[(30, 20), (55, 12), (70, 27), (60, 43), (42, 48)], [(42, 48), (65, 50), (74, 70), (55, 88), (28, 82)]],
    "7": [[(25, 20), (75, 20), (60, 50), (45, 88)]],
    "8": [
        [(50, 50), (30, 35), (40, 15), (60, 15), (70, 33), (50, 50), (30, 70), (40, 90), (62, 88), (70, 68), (50, 50)]
    ],
}


@pytest.fixture(scope="module")
def robust(deployed: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address at which a run of the recipe for drawn digits is served."""
    flags = {"workload": ROOT / "examples" / "digits.py", "recipe": "robust", "num_epochs": 2, "num_workers": 0}
    storage = tmp_path_factory.mktemp("robust")
    run_main("train", *as_flags({**flags, "storage_path": storage}))
    serve.run(example.app({"storage_path": str(storage)}))
    return deployed


@pytest.mark.browser
@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_shows_what_is_drawn_dropped_or_written_with_keys(
    robust: str, width: int, colour_scheme: Any, tmp_path: Path, mnist_test: Arrays
) -> None:
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "two.png").write_bytes(picture(255 - mnist_test.inputs[1]))
    problems, asked = list[str](), set[str]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colour_scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(robust)
        expect.set_options(timeout=60_000)
        best = page.locator(".row.best span")
        box: Any = page.locator("canvas").bounding_box()
        for digit, strokes in STROKES.items():
            page.get_by_role("button", name="Clear").click()
            for first, *others in strokes:
                page.mouse.move(box["x"] + first[0] * box["width"] / 100, box["y"] + first[1] * box["width"] / 100)
                page.mouse.down()
                for x, y in others:
                    page.mouse.move(box["x"] + x * box["width"] / 100, box["y"] + y * box["width"] / 100, steps=5)
                page.mouse.up()
            expect(best).to_have_text(digit)
        content = [*(tmp_path / "two.png").read_bytes()]
        page.evaluate(
            """content => {
                const dropped = new DataTransfer();
                dropped.items.add(new File([new Uint8Array(content)], "two.png"));
                document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, bubbles: true}));
            }""",
            content,
        )
        expect(best).to_have_text("2")
        page.reload()
        page.keyboard.press("Tab")
        keys = [*["ArrowUp"] * 8, *["ArrowLeft"] * 6, "Space", *["ArrowRight"] * 12]
        for key in [*keys, *["ArrowDown", "ArrowLeft", "ArrowDown"] * 9, "Space"]:
            page.keyboard.press(key)
        expect(best).to_have_text("7")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        colours = page.evaluate("(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))")
        text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (text > back) == (colour_scheme == "dark")
        browser.close()
    assert (problems, {url for url in asked if not url.startswith((robust, "blob:"))}) == ([], set())
