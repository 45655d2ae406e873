"""The tutorials in docs/learn do what they show: each page's commands run, and print what the page prints.

- A block that is indented by four spaces is a terminal. A line after ``$ `` is a command, and the lines below it, up to
  the next command, are its whole output. A command that ends in a backslash goes on in the next line.
- A ``python`` block is a file, or a method of one: the text before it says "Save this as `FILE`", or "replace `METHOD`
  in `FILE` by". Below a heading "Install", nothing runs: it would download.
- ``^C`` in an output is Ctrl-C, pressed once the lines above it are printed.
- A line ``…`` stands for any number of lines; ``…`` in a line for any text. A number matches any other number, but an
  accuracy only one within 10 to 20 %. Empty lines and progress within an epoch do not count, nor what Ray prints only
  where its output is no terminal, or where there is no network.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, copy_tracked_files

PAGES = ROOT / "docs" / "learn"
TIMEOUT_S = 300  # of a command
INTERRUPT, ANY = "^C", "…"
BLOCK = re.compile(r"(```python\n.*?```\n|(?:^    [^\n]*\n(?:\n(?=    ))?)+)", re.MULTILINE | re.DOTALL)
ACCURACY = r"accuracy \d+\.\d+%"
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"
LEFT_OUT = re.compile(r"epoch \d+/\d+ +\d+/\d+ |\[.*network_util\.cc")  # at the beginning of a line
RAYS = re.compile(r"\x1b\[\d+m|\d+-\d+-\d+ [\d:,]+\s+[A-Z]+ \w+\.py:\d+ -- ")
NAMESPACES = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")


@dataclass(frozen=True)
class File:
    """A file that the reader saves, or a method that replaces the one of the same name in a file."""

    name: str
    text: str
    is_method: bool

    def save(self, folder: Path) -> None:
        path, text = folder / self.name, self.text
        if self.is_method:
            method = re.match(r"\s*def (\w+)", text)
            assert method
            old = rf"^    def {method[1]}\(.*?(?=^    def |^\S)"
            text, number = re.subn(old, lambda _: self.text + "\n", path.read_text(), flags=re.MULTILINE | re.DOTALL)
            assert number == 1, f"{self.name} has no method {method[1]}"
        path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Command:
    """What the reader types, and the lines that the page shows below."""

    text: str
    shown: tuple[str, ...]


def read_page(text: str) -> Iterator[File | Command]:
    """Yield what the reader of a page does, in order."""
    before = ""
    for block in BLOCK.split(re.sub(r"^## Install\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)):
        if block.startswith("```python"):
            said = re.search(r".*(Save this as|replace `\w+` in) `([^`]+)`", " ".join(before.split()))
            assert said, f"no file's name before this block:\n{block}"
            code = block.removeprefix("```python\n").removesuffix("```\n")
            yield File(said[2], code, is_method=said[1].startswith("replace"))
        elif block.startswith("    "):
            for part in re.split(r"^\$ ", re.sub("^    ", "", block, flags=re.MULTILINE), flags=re.MULTILINE)[1:]:
                typed = re.match(r"(?:.*\\\n)*.*", part)
                assert typed
                yield Command(typed[0], tuple(part[typed.end() :].strip("\n").splitlines()))
        else:
            before = block


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Return whether printed lines are those that a page shows."""
    pattern = "".join("(?:.*\n)*?" if line == ANY else pattern_of(line) + "\n" for line in kept(shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in kept(printed))) is not None


def pattern_of(line: str) -> str:
    def piece(part: str) -> str:
        if re.fullmatch(ACCURACY, part):
            tens = int(float(part[9:-1])) // 10
            return rf"accuracy (?:{tens - 1}|{tens}|{tens + 1})\d\.\d+%"
        if re.fullmatch(NUMBER, part):
            return NUMBER
        return ".*" if part == ANY else r"\s+" if part.isspace() else re.escape(part)

    return "".join(map(piece, re.split(rf"({ACCURACY}|{NUMBER}|{ANY}|\s+)", line)))


def kept(lines: Sequence[str]) -> list[str]:
    """Return the lines that count."""
    plain = (RAYS.sub("", line).strip() for line in lines)
    return [line for line in plain if line and not LEFT_OUT.match(line)]


class Terminal:
    """A shell in which a page's commands run one after the other, in a folder."""

    def __init__(self, folder: Path, variables: dict[str, str], *, is_alone: bool) -> None:
        self._shell = subprocess.Popen(
            [*(NAMESPACES if is_alone else ()), "bash"],
            cwd=folder,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._type("trap : INT")  # the shell outlives a Ctrl-C
        if is_alone:
            self._type("ip link set lo up")

    def _read(self) -> None:
        assert self._shell.stdout
        for line in self._shell.stdout:
            self._lines.put(line.rstrip("\n"))

    def _type(self, text: str) -> None:
        assert self._shell.stdin
        self._shell.stdin.write(text + "\n")
        self._shell.stdin.flush()

    def run(self, command: Command) -> None:
        """Run a command. Raises AssertionError if it fails or prints something else than the page shows."""
        shown, printed = list(command.shown), list[str]()
        before = shown[: shown.index(INTERRUPT)] if INTERRUPT in shown else None
        self._type(f"{{ {command.text}\n}} < /dev/null; printf '\\nstatus %s\\n' $?")
        stop_at = time.monotonic() + TIMEOUT_S
        while not printed or not re.fullmatch(r"status \d+", printed[-1]):
            try:
                printed.append(self._lines.get(timeout=max(0, stop_at - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"{command.text} takes too long, and printed:\n" + "\n".join(printed))
            if before is not None and matches(before, printed):
                os.killpg(self._shell.pid, signal.SIGINT)
                before = None
        *printed, status = printed
        print("\n".join([f"$ {command.text}", *printed]))  # pytest -rP shows it, to write a page
        is_shown = matches([line for line in shown if line != INTERRUPT], printed)
        assert is_shown, "\n".join([command.text, "shows:", *shown, "but printed:", *kept(printed)])
        assert status == "status 0" or INTERRUPT in shown, f"{command.text} exits with {status}"

    def folder(self) -> Path:
        """Return the folder that the shell is in."""
        self._type("pwd")
        return Path(self._lines.get(timeout=TIMEOUT_S))

    def close(self) -> None:
        """End the shell and what it has started."""
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()


@pytest.fixture
def variables(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables of a terminal: a home of its own, and this environment's programs."""
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="learn-") as for_ray:  # sockets need a short path
        yield {
            "HOME": str(tmp_path / "home"),
            "MNIST_RAY_STORAGE_PATH": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path / "mnist_ray"),
            "RAY_ADDRESS": "",
            "RAY_TMPDIR": for_ray,
        }


@pytest.mark.long
@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorials_commands_print_what_it_shows(page: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    is_alone = "ray start" in text  # so that its ports are free, and `ray stop` stops no other
    if is_alone and subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs namespaces: unshare")
    terminal = Terminal(copy_tracked_files(tmp_path / "mnist_ray"), variables, is_alone=is_alone)
    try:
        for step in read_page(text):
            if isinstance(step, File):
                step.save(terminal.folder())
            else:
                terminal.run(step)
    finally:
        terminal.close()


SHOWN = [
    "epoch 2/2  finished in 5.83 s: loss 0.0439",
    ANY,
    "test  accuracy 99.19% on 10,000 images",
    "at  …/r.html",
]
PRINTED = ["epoch 2/2  113/430  loss 0.2", "epoch 2/2  finished in 12.1 s: loss 0.0501", "", "confusion  label"]


@pytest.mark.parametrize(
    ("end", "is_same"),
    [
        (["test  accuracy 88.70% on 10,000 images", "at  /home/you/r.html"], True),
        (["test  accuracy 78.70% on 10,000 images", "at  /home/you/r.html"], False),
        (["test  accuracy 98.70% on 10,000 rows", "at  /home/you/r.html"], False),
        (["test  accuracy 98.70% on 10,000 images", "at  /home/you/r.html", "note  more"], False),
    ],
)
def test_an_output_is_a_pages_if_only_numbers_differ(end: list[str], is_same: bool) -> None:
    assert matches(SHOWN, [*PRINTED, *end]) == is_same


def test_a_page_is_read_from_top_to_bottom() -> None:
    text = (
        "# A page\n\n## Install\n\n    $ make\n\n## Use\n\nSave this as `one.py`:\n\n```python\nprint(1)\n```\n\n"
        "    $ python \\\n      one.py\n    1\n\n"
        "Now replace `go` in `one.py` by:\n\n```python\n    def go(self):\n```\n\n"
        "    $ cat a\n    one\n\n    two\n    $ cat b\n"
    )
    assert list(read_page(text)) == [
        File("one.py", "print(1)\n", is_method=False),
        Command("python \\\n  one.py", ("1",)),
        File("one.py", "    def go(self):\n", is_method=True),
        Command("cat a", ("one", "", "two")),
        Command("cat b", ()),
    ]
