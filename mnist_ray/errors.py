"""The two errors that users see as one line, and the formatting and redaction of printed text.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

PROGRAM = "mnist-ray"
_EXTRAS = "extras"  # the folder of the modules that use Ray's private API
_PACKAGE = Path(__file__).parent
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in Ray's messages
_IN_ANOTHER_PROCESS = "\nOriginal Traceback "  # in errors that torch's DataLoader passes on
_MORE = "the system lets this user {} no more {}; raise that limit (ulimit -{})"
_LIMITS = {  # by what errors and logs say
    r"Errno 11\]|can't start new thread|Resource temporarily": _MORE.format("start", "processes or threads", "u"),
    "Too many open files|ulimit -n": _MORE.format("open", "files", "n"),
    "No space left on device": "No space left on device, or no inodes (df -i)",
}
_USER = re.compile(
    r"(?<=:/)(/?)(?:[^\s/]*"  # user:password before the host, …
    r"|[^\s/?#:@]*:(?!\d+(?:[/?#\s]|$))\S*)@"  # … including an S3 key with unescaped slashes
)
_OPTION = re.compile(
    r"([?&#;][\w.-]*(?:secret|token|pass|pwd|key|credential|signature|sig|auth)[\w.-]*=)"
    r"[^&\s]*[^&\s'\")\],;:.]",  # without the punctuation that follows a value
    re.IGNORECASE,
)


class UsageError(Exception):
    """The user asked for something impossible: a wrong flag, value or path. Exit status 2."""


class JobError(Exception):
    """Something went wrong: bad data, a damaged file, a failed run. Exit status 1."""

    hints = ""  # where to look, and how to go on; an error gets them on its way to the user

    def __str__(self) -> str:
        return self.text + self.hints

    @property
    def text(self) -> str:
        """The message without the hints."""
        return super().__str__()


class TrainingStoppedError(JobError):
    """Training cannot go on with this code and these settings: a retry would fail too."""


class UnreadableDataError(TrainingStoppedError):
    """Training can be resumed once the data, or the code that reads them, are mended."""


class ExampleError(Exception):
    """An example cannot be read, or does not fit the others; a retry would fail too."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    text = f"sys.exit({error})" if isinstance(error, SystemExit) else _COLOURS.sub("", str(error)).strip()
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # Ray cannot send surrogates
    text = text or type(error).__name__
    lines = text.splitlines()
    line = lines[-1].partition(": ")[2] if _IN_ANOTHER_PROCESS in text else lines[0]
    return line.removesuffix(".")  # more may follow


def with_place(error: BaseException, *folders: Path, fallback: Path = _PACKAGE) -> str:
    """Return one line: an error, and its innermost frame in the first of ``folders`` with any, else ``fallback``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    if _IN_ANOTHER_PROCESS in str(error):
        frames = re.findall(r'File "(.+)", line (\d+), in .+', str(error))
    else:
        tracebacks = [known.__traceback__ for known in (error, error.__cause__) if known is not None]
        frames = [(frame.filename, frame.lineno) for stack in tracebacks for frame in traceback.extract_tb(stack)]
    is_for_users = isinstance(error, (UsageError, JobError, ExampleError))  # this package's code is not their cause
    said = first_line(error) if is_for_users else f"{type(error).__name__}: {first_line(error)}"
    for folder in folders if is_for_users else (*folders, fallback):
        for file, line in reversed(frames):
            if folder in Path(file).parents and "site-packages" not in Path(file).parts:
                return f"{said} ({Path(file).name}, line {line})"
    return said


def sendable(error: BaseException) -> BaseException | None:
    """Return an error as the cause of another, or None if its traceback has surrogates, which Ray cannot send."""
    text = "".join(traceback.format_exception(error))
    return error if text.encode("utf-8", "replace").decode("utf-8") == text else None


def about_ray(error: BaseException) -> str | None:
    """Return one line if an error means that Ray's private API is not as the package knows it; else None."""
    *_, last = traceback.extract_tb(error.__traceback__)
    is_of_extra = Path(last.filename).parent == _PACKAGE / _EXTRAS
    if not isinstance(error, (AttributeError, ImportError, TypeError)) or not is_of_extra:
        return None
    return f"Ray {sys.modules['ray'].__version__} does not work here: {first_line(error)}; use --plain-ray"


def about_limit(said: object) -> str | None:
    """Return one line if an error, or the text of a log, means that a limit of the system is reached; else None."""
    return next((line for pattern, line in _LIMITS.items() if re.search(pattern, str(said))), None)


def masked(text: str) -> str:
    """Return a text in which users, passwords and secret options of URIs are replaced by ``***``."""
    return _OPTION.sub(r"\1***", _USER.sub(r"\1***@", text))


def redact(text: object) -> str:
    """Return a text as one line that is safe to print: secrets masked, control characters escaped."""
    text = masked(str(text))
    if text.isprintable():
        return text
    return escaped(text, str.isprintable)


def escaped(text: str, is_plain: Callable[[str], bool]) -> str:
    """Return a text with escapes, such as ``\\x1b``, for all characters that are not plain."""
    return "".join(letter if is_plain(letter) else letter.encode("unicode_escape").decode("ascii") for letter in text)


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


class Output:
    """A text stream. From the first failure on (a full disk, a closed pipe), what is written to it is discarded."""

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
                say(f"note: the output cannot be written ({error.strerror}): going on without it", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_output() -> None:
    """Escape characters that the terminal's encoding lacks; discard the output if the streams are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in ``2 images``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def size_of(num_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def clock_time(seconds: float) -> str:
    """Return a duration as ``M:SS``, or ``H:MM:SS`` from an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    return f"{hours}:{minutes_of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def in_words(name: str) -> str:
    """Return ``batch_size`` as ``batch size``."""
    return name.replace("_", " ")


def format_settings(values: Mapping[str, Any]) -> str:
    """Return settings as text: ``batch size 128, learning rate 0.005``."""
    return ", ".join(f"{in_words(name)} {format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """Return a setting's value as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the most similar known name; empty if none is similar."""
    cutoff = 0.7 if name.startswith("--") else 0.65  # --train-size and --validation-size are 0.69 alike
    close = difflib.get_close_matches(name, list(known), 1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def command(name: str) -> str:
    """Return how to call a command: with the installed program if that is running, else with the command's script."""
    running = Path(sys.argv[0])
    if running.name.startswith(PROGRAM):
        return f"{PROGRAM} {name}"
    folder = os.path.relpath(running.parent) if running.parent.name == "jobs" else "jobs"  # from the current folder
    return f"python {shlex.quote(f'{folder}/{name}.py')}"
