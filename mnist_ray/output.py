"""The output of a command: one redacted line at a time, on streams that may fail."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from mnist_ray.errors import JobError
from mnist_ray.text import redact


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, redacted. All output except JSON goes through this function or ``RunConsole``. Raises JobError."""
    with writing():
        print(redact(text), file=file)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Raise a JobError if the output cannot be written. If its reader has gone, BrokenPipeError is raised as usual."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise JobError(f"the output cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def one_object(*, is_wanted: bool) -> Iterator[dict[str, Any]]:
    """If it is wanted, print the yielded dict as a JSON object at the end; until then, stdout is stderr.

    After an error, print nothing. Infinity and NaN become null.
    """
    values: dict[str, Any] = {}
    if not is_wanted:
        yield values
        return
    with writing():
        sys.stdout.flush()
        kept = os.dup(1)
    try:
        os.dup2(2, 1)  # also for processes that this one starts
        with contextlib.redirect_stdout(sys.stderr):
            yield values
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    with writing():
        sys.stdout.write(json.dumps(finite(values)) + "\n")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold: with null for NaN and infinity."""
    return dict(json.loads(json.dumps(values), parse_constant=lambda name: None))


class Output:
    """A text stream. After the first failure (a full disk, a closed pipe), all further text is discarded."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write a text."""
        self._surviving(functools.partial(self._stream.write, text))
        return len(text)

    def flush(self) -> None:
        """Write what is in the stream's buffer."""
        self._surviving(self._stream.flush)

    def _surviving(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            with contextlib.suppress(OSError, JobError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what is left in the buffer
                say(f"note: the output cannot be written ({error.strerror}): continuing without it", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_output() -> None:
    """Escape characters that the terminal's encoding lacks; discard the output if the streams are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
