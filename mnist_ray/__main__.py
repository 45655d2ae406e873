"""The installed program: ``mnist-ray train``, ``mnist-ray tune`` and so on, as ``jobs/`` has them."""

from __future__ import annotations

import importlib
import sys

from mnist_ray import cli
from mnist_ray.errors import PROGRAM, say

_COMMANDS = ("train", "tune", "evaluate", "predict", "view", "report", "export")


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in _COMMANDS:
        sys.argv[:2] = [f"{PROGRAM} {name}"]
        cli.run(importlib.import_module(f"mnist_ray.commands.{name}").main)
    wanted = name in ("-h", "--help")
    if not wanted:
        say(f"{PROGRAM}: error: there is no command {name}", file=sys.stderr)
    say(f"usage: {PROGRAM} {{{','.join(_COMMANDS)}}} …; each has --help", file=sys.stdout if wanted else sys.stderr)
    sys.exit(0 if wanted else 2)


if __name__ == "__main__":
    main()
