"""The two kinds of failure that a person reads as one line; any other exception is a bug and keeps its traceback."""


class UsageError(Exception):
    """What the user asked for cannot be: a wrong flag, value or path. Exit status 2."""


class JobError(Exception):
    """What the user asked for went wrong: bad data, a damaged file, a failed run. Exit status 1."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
