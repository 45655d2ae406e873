"""What may be shown of texts that come from outside: no secrets of URIs, nothing that drives a terminal.

Standard library only: it runs before a wrong flag is answered.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

MASK = "***"
_USER = re.compile(
    r"(?<=:/)(/?)(?:[^\s/]*"  # up to the host …
    r"|[^\s/?#:@]*:(?!\d+(?:[/?#\s]|$))\S*)@"  # … or further: keys for S3 have slashes that should have been escaped
)
_OPTION = re.compile(
    r"([?&#;][\w.-]*(?:secret|token|pass|pwd|key|credential|signature|sig|auth)[\w.-]*=)"
    r"[^&\s]*[^&\s'\")\],;:.]",  # but no mark of the sentence around it
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile(r"[^ -~]")  # or not ASCII: looked at one by one


def masked(text: str) -> str:
    """Return a text whose URIs have no user information and no secret options any more."""
    return _OPTION.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def redact(text: object) -> str:
    """Return a text in one line without secrets, in which what is not printed is written as Python writes it."""
    return _UNPRINTABLE.sub(_escaped, masked(str(text)))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line: every text of the jobs goes through here, through ``RunConsole``, or is JSON."""
    print(redact(text), file=file)


def without_user(uri: str) -> str:
    """Return a masked URI; of those for which variables can take its place, without the user information."""
    uri = masked(uri)
    return uri.replace(f"://{MASK}@", "://", 1) if uri.startswith(("s3:", "http:", "https:")) else uri


def print_whatever_it_is() -> None:
    """Let the standard streams write what their encoding lacks as escapes, and nowhere where they are closed."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
