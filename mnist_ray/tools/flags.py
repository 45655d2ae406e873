"""What the command lines of the tools have in common. Light: it runs before a wrong flag is answered."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from mnist_ray import cli
from mnist_ray.config import LookupConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.settings import names_of
from mnist_ray.storage import CONFIG_FILE, RunFolder, find_run, untrusted_folders
from mnist_ray.workload import source
from mnist_ray.workload.base import Workload


def add_workload(parser: cli.Parser, default: str = "where it was") -> None:
    """Add ``--workload`` to a parser."""
    shown = f"where the workload's code is; default: {default}"
    parser.add_argument("--workload", metavar="FILE.py", default=cli.UNSET, help=shown)


def add_run(parser: cli.Parser, name: str) -> None:
    """Add the argument that names a run or a checkpoint, and ``--workload``."""
    options: dict[str, Any] = {"default": cli.UNSET} if name.startswith("--") else {"nargs": "?"}
    parser.add_argument(
        name,
        metavar="CHECKPOINT_OR_RUN",
        help="a checkpoint's or a run's folder or URI, or a run's name; default: the newest run",
        **options,
    )
    add_workload(parser)


def workload_class(*config_classes: type) -> type[Workload]:
    """Return the workload of the run that the command line names, else of the newest; MNIST where none is known.

    Its settings are to become flags beside those of ``config_classes``, so it has to be known before all flags are.
    Raises UsageError.
    """
    peeked = cli.peek("workload", "storage_path")
    if "workload" in peeked:
        return source.load(peeked["workload"])
    with contextlib.suppress(UsageError, argparse.ArgumentError):  # said when all flags are known
        run = cli.peek_word("workload", *names_of(config_classes))
        storage_path = peeked.get("storage_path", LookupConfig().storage_path)
        return class_of(find_run(run, storage_path), storage_path)
    return source.load(source.DEFAULT)


def class_of(run: RunFolder, storage_path: str) -> type[Workload]:
    """Return the workload of a run, or of the run that a checkpoint lies in. Raises UsageError as ``load_again``."""
    untrusted = untrusted_folders(run, storage_path)
    for folder in (run, run.storage):
        with contextlib.suppress(JobError):  # the checkpoint says it too
            reference = (folder.read_json(CONFIG_FILE) or {}).get("workload")
            if isinstance(reference, str):
                return source.load_again(reference, None, folder.inside(CONFIG_FILE).uri, untrusted)
    return source.load(source.DEFAULT)
