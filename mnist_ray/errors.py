"""The two kinds of failure that a person reads as one line; any other exception is a bug and keeps its traceback."""

import re
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parent
_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")  # colours, which Ray has in its texts
_IN_ANOTHER_PROCESS = "\nOriginal Traceback "  # by which torch's DataLoader tells of an error in one of its processes


class UsageError(Exception):
    """What the user asked for cannot be: a wrong flag, value or path. Exit status 2."""


class JobError(Exception):
    """What the user asked for went wrong: bad data, a damaged file, a failed run. Exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type where it has none."""
    text = _ESCAPE_CODES.sub("", str(error)).strip() or type(error).__name__
    if _IN_ANOTHER_PROCESS in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text.splitlines()[0]


def with_place(error: BaseException, *folders: Path, or_here: bool = True) -> str:
    """Return an error in one line, with the last place that it came through in the first of ``folders`` with one.

    ``or_here`` tells whether a place in this package will do where there is none.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    said, frames = f"{type(error).__name__}: {first_line(error)}", traceback.extract_tb(error.__traceback__)
    if _IN_ANOTHER_PROCESS in str(error):
        found_in_text = re.findall(r'File "(.+)", line (\d+), in (.+)', str(error))
        frames = traceback.StackSummary.from_list(
            [(file, int(line), name, None) for file, line, name in found_in_text]
        )
    places = [*(_in(folder, frames) for folder in folders), _in(_PACKAGE, frames) if or_here else []]
    place = next((f" ({Path(found[-1].filename).name}, line {found[-1].lineno})" for found in places if found), "")
    return said + place


def _in(folder: Path, frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Return the frames of files in a folder, but not of packages installed below it."""
    return [f for f in frames if folder in Path(f.filename).parents and "site-packages" not in Path(f.filename).parts]
