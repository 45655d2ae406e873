"""The errors that users see as one line, and the lines that describe other errors.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

_EXTRAS = "extras"  # the folder of the modules that use Ray's private API
_PACKAGE = Path(__file__).parent
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in Ray's messages
_IN_ANOTHER_PROCESS = "\nOriginal Traceback "  # in errors that torch's DataLoader passes on


class _FixableError(Exception):
    """An error of one line: the problem and, after a semicolon, what the user can do."""

    def __init__(self, *problem: object, fix: str = "") -> None:
        super().__init__(*([f"{problem[0]}; {fix}"] if fix else problem))


class UsageError(_FixableError):
    """The user asked for something impossible: a wrong flag, value or path. Exit status 2."""


class JobError(_FixableError):
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
    """Training can be resumed once the data, or the code that reads them, are fixed."""


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
    """Return one line: an error, and its innermost frame in the first of ``folders`` with one, else ``fallback``."""
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


def about_ray(error: BaseException) -> str | None:
    """Return one line if an error means that Ray's private API has changed; else None."""
    *_, last = traceback.extract_tb(error.__traceback__)
    is_of_extra = Path(last.filename).parent == _PACKAGE / _EXTRAS
    if not isinstance(error, (AttributeError, ImportError, TypeError)) or not is_of_extra:
        return None
    return f"Ray {sys.modules['ray'].__version__} does not work here: {first_line(error)}; use --plain-ray"
