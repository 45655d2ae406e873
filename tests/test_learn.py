"""The tutorials in docs/learn do what they show: each page's commands run, and print what the page prints.

How a page is read, from top to bottom:

- A block that is indented by four spaces is a terminal. A line after ``$ `` is a command, and the lines below it, up to
  the next command, are its whole output. A command that ends in a backslash goes on in the next line.
- A ``python`` block is a file, or a method of one: the text before it says "Save this as `FILE`", or "replace `METHOD`
  in `FILE` by".
- Below a heading "Install", nothing runs: it would download.
- ``^C`` in an output is Ctrl-C, pressed once the lines above it are printed.

How an output is compared, line by line, in order:

- A line ``…`` stands for any number of lines, none included; ``…`` in a line for any text.
- A number in digits matches any other number, and white space any other: words and signs have to be the same.
- But percentages after "accuracy" may differ by at most ``ACCURACY_TOLERANCE``.
- Empty lines do not count, and neither do lines of progress within an epoch, which only slow machines print.
- What Ray prints only where its output is no terminal, or where there is no network, is left out: a time and a place
  before each line, colours, and warnings about the network.

A number of four digits or more that a later command repeats, such as a process id, is replaced in this command by the
number that was printed in its place.
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
ACCURACY_TOLERANCE = 15.0  # in percent: other processors round differently, and one of 24 images is 4 %
TIMEOUT_S = 300  # of a command
INTERRUPT = "^C"
ANY = "…"
BLOCK = re.compile(r"(```python\n.*?```\n|(?:^    [^\n]*\n(?:\n(?=    ))?)+)", re.MULTILINE | re.DOTALL)
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


@dataclass(frozen=True)
class Command:
    """What the reader types, and the lines that the page shows below."""

    text: str
    shown: tuple[str, ...]


def read_page(text: str) -> list[File | Command]:
    """Return what the reader of a page does, in order."""
    text = re.sub(r"^## Install\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    steps: list[File | Command] = []
    before = ""
    for block in BLOCK.split(text):
        if block.startswith("```python"):
            steps.append(_file(before, block.removeprefix("```python\n").removesuffix("```\n")))
        elif block.startswith("    "):
            steps += _commands(block)
        else:
            before = block
    return steps


def _file(before: str, text: str) -> File:
    said = " ".join(before.split())
    if saved := re.search(r".*Save this as `([^`]+)`", said):
        return File(saved[1], text, is_method=False)
    replaced = re.search(r".*replace `\w+` in `([^`]+)` by", said)
    assert replaced, f"no file's name before this block:\n{text}"
    return File(replaced[1], text, is_method=True)


def _commands(block: str) -> Iterator[Command]:
    typed = re.sub("^    ", "", block, flags=re.MULTILINE)
    for part in re.split(r"^\$ ", typed, flags=re.MULTILINE)[1:]:
        text = re.match(r"(?:.*\\\n)*.*", part)
        assert text
        yield Command(text[0], tuple(part[text.end() :].strip("\n").splitlines()))


def pattern_of(line: str) -> re.Pattern[str]:
    """Return what matches a printed line that the page shows so; each of the page's numbers is a group."""
    parts = re.split(f"({NUMBER}|{ANY}|\\s+)", line.strip())
    return re.compile("".join(_piece(part) for part in parts))


def _piece(part: str) -> str:
    if re.fullmatch(NUMBER, part):
        return f"({NUMBER})"
    return ".*" if part == ANY else r"\s+" if part.isspace() else re.escape(part)


def matches(shown: str, printed: str) -> bool:
    """Return whether a printed line is one that the page shows."""
    if pattern_of(shown).fullmatch(printed.strip()) is None:
        return False
    accuracies = [[float(number) for number in re.findall(r"accuracy (\d+\.\d+)%", line)] for line in (shown, printed)]
    return ANY in shown or all(abs(one - other) <= ACCURACY_TOLERANCE for one, other in zip(*accuracies, strict=True))


def compare(shown: list[str], printed: list[str]) -> list[tuple[str, str]] | None:
    """Return the pairs of a shown and its printed line, or None if the output is not the page's."""
    if not shown:
        return None if printed else []
    if shown[0] == ANY:
        rests = (compare(shown[1:], printed[start:]) for start in range(len(printed) + 1))
        return next((rest for rest in rests if rest is not None), None)
    if not printed or not matches(shown[0], printed[0]):
        return None
    rest = compare(shown[1:], printed[1:])
    return None if rest is None else [(shown[0], printed[0]), *rest]


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
        self._numbers: dict[str, str] = {}  # those that were printed, by the page's
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
        self._type(f"{{ {self._with_printed_numbers(command.text)}\n}} < /dev/null; printf '\\nstatus %s\\n' $?")
        stop_at = time.monotonic() + TIMEOUT_S
        while not printed or not re.fullmatch(r"status \d+", printed[-1]):
            try:
                printed.append(self._lines.get(timeout=max(0, stop_at - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"{command.text} takes too long, and printed:\n" + "\n".join(printed))
            if before is not None and compare(kept(before), kept(printed)) is not None:
                os.killpg(self._shell.pid, signal.SIGINT)
                before = None
        *printed, status = kept(printed)
        print("\n".join([f"$ {command.text}", *printed]))  # pytest -rP shows it, to write a page
        pairs = compare(kept([line for line in shown if line != INTERRUPT]), printed)
        assert pairs is not None, "\n".join([command.text, "shows:", *shown, "but printed:", *printed])
        assert status == "status 0" or INTERRUPT in shown, f"{command.text} exits with {status}"
        self._note_numbers(pairs)

    def _with_printed_numbers(self, text: str) -> str:
        return re.sub(r"\d{4,}", lambda found: self._numbers.get(found[0], found[0]), text)

    def _note_numbers(self, pairs: list[tuple[str, str]]) -> None:
        for shown, printed in pairs:
            found = pattern_of(shown).fullmatch(printed.strip())
            assert found
            self._numbers.update(zip(re.findall(NUMBER, shown), found.groups(), strict=True))

    def folder(self) -> Path:
        """Return the folder that the shell is in."""
        self._type("pwd")
        return Path(self._lines.get(timeout=TIMEOUT_S))

    def close(self) -> None:
        """End the shell and what it has started."""
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()


def kept(lines: Sequence[str]) -> list[str]:
    """Return the lines that count."""
    plain = (RAYS.sub("", line).strip() for line in lines)
    return [line for line in plain if line and not LEFT_OUT.match(line)]


def save(file: File, folder: Path) -> None:
    """Save a file as the reader does."""
    path = folder / file.name
    if not file.is_method:
        path.write_text(file.text, encoding="utf-8")
        return
    text, method = path.read_text(encoding="utf-8"), re.match(r"\s*def (\w+)", file.text)
    assert method
    replaced, number = re.subn(
        rf"^    def {method[1]}\(.*?(?=^    def |^\S)", lambda _: file.text + "\n", text, flags=re.MULTILINE | re.DOTALL
    )
    assert number == 1, f"{file.name} has no method {method[1]}"
    path.write_text(replaced, encoding="utf-8")


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
    is_alone = "ray start" in page.read_text(
        encoding="utf-8"
    )  # so that its ports are free, and `ray stop` stops no other
    if is_alone and subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs namespaces: unshare")
    terminal = Terminal(copy_tracked_files(tmp_path / "mnist_ray"), variables, is_alone=is_alone)
    try:
        for step in read_page(page.read_text(encoding="utf-8")):
            if isinstance(step, File):
                save(step, terminal.folder())
            else:
                terminal.run(step)
    finally:
        terminal.close()


SHOWN = """
    epoch 2/2  finished in 5.83 s (9,437 images/s): loss 0.0439
    …
    test       accuracy 99.19%, loss 0.0266 on 10,000 images
    report     …/ray_results/first/report.html
"""
PRINTED = """
    epoch 2/2  113/430  loss 0.2
    epoch 2/2  finished in 12.1 s (937 images/s): loss 0.0501

    confusion  label
    test       accuracy 98.70%, loss 0.03 on 10,000 images
    report     /home/you/ray_results/first/report.html
"""


@pytest.mark.parametrize(
    ("word", "other", "is_same"),
    [
        ("12.1 s", "7 s", True),
        ("/home/you", "~", True),
        ("finished", "ended", False),
        ("10,000 images", "10,000 rows", False),
        ("98.70%", "78.70%", False),
        ("report.html", "report.html\nnote       more", False),
    ],
)
def test_an_output_is_a_pages_if_only_numbers_differ(word: str, other: str, is_same: bool) -> None:
    printed = PRINTED.replace(word, other)
    assert printed != PRINTED
    assert (compare(kept(SHOWN.splitlines()), kept(printed.splitlines())) is not None) == is_same


def test_a_page_is_read_from_top_to_bottom() -> None:
    page = """# A page

## Install

    $ make

## Use

Save this as `one.py`:

```python
    print("$ 1")
```

    $ python \\
      one.py
    1

Then replace `go` in `one.py` by:

```python
    def go(self):
        pass
```

    $ cat a
    one

    two
    $ cat b
"""
    assert read_page(page) == [
        File("one.py", '    print("$ 1")\n', is_method=False),
        Command("python \\\n  one.py", ("1",)),
        File("one.py", "    def go(self):\n        pass\n", is_method=True),
        Command("cat a", ("one", "", "two")),
        Command("cat b", ()),
    ]
