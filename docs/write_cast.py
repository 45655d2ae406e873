"""Record a job that is killed and resumed, as docs/kill.svg: python docs/write_cast.py. It takes a minute.

An undisturbed run comes first; at the end, the digests of both runs' weights are shown. Lines are as printed, after the
time that passed, at most ``PAUSE_S``; the storage is called ``runs``. Long blocks are cut, which ``…`` shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
TRAIN = "python jobs/train.py --num-workers 2 --checkpoint-every 100 --run-name"
PAUSE_S, HOLD_S = 1.5, 8.0
COLUMNS = 116  # of the terminal
KILLED = "Killed"  # as a shell says after kill -9
HIDDEN = ("confusion", "            ", "settings", "time", "seconds", "result", "report", "note")
LINE, LEFT = 19, 14  # pixels
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" aria-labelledby="t d">
<title id="t">A job is killed, and resumed</title>
<desc id="d">{text}</desc>
<style>
rect{{fill:#0d1117}}
text{{font:13px ui-monospace,Consolas,monospace;fill:#e6edf3;white-space:pre;animation:show {total}s infinite both}}
.p{{fill:#7ee787;font-weight:600}}.k{{fill:#ff7b72;font-weight:600}}
{frames}
@media (prefers-reduced-motion:reduce){{text{{animation:none!important}}}}
</style>
<rect width="{width}" height="{height}" rx="8"/>
"""


@dataclass(frozen=True)
class Shown:
    """A line of the terminal."""

    at_s: float  # seconds from the start
    text: str
    kind: str = ""  # "p": typed; "k": the kill


def main() -> None:
    """Run the three jobs, and write the picture."""
    with tempfile.TemporaryDirectory() as storage:
        environment = {**os.environ, "MNIST_RAY_STORAGE_PATH": storage}
        list(lines_of("undisturbed", environment))
        shown = [Shown(0.0, f"$ {TRAIN} mnist", "p")]
        shown += recorded(lines_of("mnist", environment, is_killed=True), shown[-1].at_s)
        shown += [Shown(shown[-1].at_s + PAUSE_S, f"$ {TRAIN} mnist --resume", "p")]
        shown += recorded(lines_of("mnist", environment, "--resume"), shown[-1].at_s)
        shown += [Shown(shown[-1].at_s + PAUSE_S, "$ grep -o 'weights_sha256.*' */result.json", "p")]
        for run in ("mnist", "undisturbed"):
            digest = json.loads(Path(storage, run, "result.json").read_text())["weights_sha256"]
            shown.append(Shown(shown[-1].at_s + 0.1, f'{run}/result.json:weights_sha256": "{digest}",'))
        shown = [replace(line, text=line.text.replace(storage, "runs")) for line in shown]
    shown = [replace(line, text=row) for line in shown for row in wrap(line.text, COLUMNS, drop_whitespace=False)]
    (ROOT / "docs" / "kill.svg").write_text(drawn(shown), encoding="utf-8")


def lines_of(run: str, environment: dict[str, str], *more: str, is_killed: bool = False) -> Iterator[str]:
    """Yield what a job prints; kill it, if asked, two seconds after the first epoch."""
    command = [sys.executable, *TRAIN.split()[1:], run, *more]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if is_killed and line.startswith("error:"):
                yield KILLED
            yield line.rstrip()
            if is_killed and "validation after epoch 1" in line:
                threading.Timer(2, job.kill).start()


def recorded(lines: Iterable[str], start_s: float, now: Callable[[], float] = time.monotonic) -> list[Shown]:
    """Return lines with the moments at which they come; of a hidden block, one line with dots."""
    found, at_s, before = list[Shown](), start_s, now()
    for line in lines:
        text = "…" if line.startswith(HIDDEN) else line
        at_s += min(now() - before, PAUSE_S)
        before = now()
        if text != "…" or not found or found[-1].text != "…":
            found.append(Shown(at_s, text, "k" if text == KILLED else ""))
    return found


def drawn(shown: Sequence[Shown]) -> str:
    """Return an animated picture that repeats; without motion, it shows all lines."""
    total = shown[-1].at_s + HOLD_S
    frames, texts = list[str](), list[str]()
    for number, line in enumerate(shown):
        part = max(100 * line.at_s / total, 0.01)
        frames.append(f"@keyframes f{number}{{0%,{part - 0.01:.2f}%{{opacity:0}}{part:.2f}%,100%{{opacity:1}}}}")
        place = f'x="{LEFT}" y="{LINE * (number + 1) + 6}" style="animation-name:f{number}"'
        texts.append(f'<text class="{line.kind}" {place}>{escape(line.text)}</text>')
    width = 2 * LEFT + 8 * max(len(line.text) for line in shown)
    whole = escape(" ".join(line.text for line in shown if line.kind))
    head = HEAD.format(
        width=width, height=LINE * len(shown) + 2 * LEFT, text=whole, total=round(total, 1), frames="\n".join(frames)
    )
    return head + "\n".join(texts) + "\n</svg>\n"


if __name__ == "__main__":
    main()
