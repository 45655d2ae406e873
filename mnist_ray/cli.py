"""The commands: ``jobs/`` and ``mnist-ray`` run these. Each reads its flags, then imports what it needs.

Nothing here imports torch or Ray, so that a wrong flag is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from mnist_ray import signals
from mnist_ray.cluster import environment
from mnist_ray.cluster.forking.starting import prepared_forking
from mnist_ray.config import EvaluationConfig, ExportConfig, LookupConfig, PredictionConfig, ViewConfig, WorkerConfig
from mnist_ray.errors import PROGRAM, JobError, UsageError, print_whatever_it_is, say
from mnist_ray.flags import UNSET, Parser, peek, peek_word
from mnist_ray.run.job import read_job
from mnist_ray.run.lookup import class_of, find_run
from mnist_ray.run.train import train as train_job
from mnist_ray.settings import build, names_of
from mnist_ray.sweep.options import read_sweep
from mnist_ray.sweep.tune import tune as tune_sweep
from mnist_ray.workload import source
from mnist_ray.workload.base import Workload


def train() -> None:
    """Train a workload on Ray, evaluate it on the test set, and write the run's files."""
    train_job(read_job())


def tune() -> None:
    """Search the settings that have a search space with Ray Tune, train the best and evaluate it once."""
    tune_sweep(read_sweep())


def evaluate() -> None:
    """Evaluate a checkpoint on the test set."""
    workload_class = _workload_class(EvaluationConfig, LookupConfig)
    parser = Parser(_about(evaluate), EvaluationConfig, workload_class.Settings, LookupConfig)
    _add_run(parser, "checkpoint")
    given = parser.read_flags()
    environment.prepare(verbose=False)
    with prepared_forking(WorkerConfig(), "mnist_ray.run.evaluate") as forking:
        from mnist_ray.run.find import find
        from mnist_ray.tools.evaluation import evaluate_found

        changes = {name: given[name] for name in names_of([workload_class.Settings]) if name in given}
        found = find(given["checkpoint"], build(LookupConfig, given).storage_path, given.get("workload"), changes)
        evaluate_found(found, build(EvaluationConfig, given), forking)


def predict() -> None:
    """Print a trained model's predictions for your own pictures."""
    parser = Parser(_about(predict), PredictionConfig, LookupConfig)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="pictures, or folders of them")
    _add_run(parser, "--run")
    given = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.run.find import find
    from mnist_ray.tools.predict import predict as predict_pictures
    from mnist_ray.tools.predict import takes_pictures

    storage_path = build(LookupConfig, given).storage_path
    found = find(given.get("run"), storage_path, given.get("workload"), is_wanted=takes_pictures)
    predict_pictures(given["images"], found, build(PredictionConfig, given))


def view() -> None:
    """Look at the examples of a workload's data."""
    workload_class = source.load(peek("workload").get("workload", source.DEFAULT))
    parser = Parser(_about(view), ViewConfig, workload_class.Settings)
    _add_workload(parser, default="MNIST")
    given = parser.read_flags()

    from mnist_ray.tools.view import view as view_examples

    view_examples(workload_class(build(workload_class.Settings, given)), build(ViewConfig, given))


def report() -> None:
    """Make a run's report again, or compare several runs."""
    parser = Parser(_about(report), LookupConfig)
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="a run's folder, URI or name, also a sweep's; default: the newest run"
    )
    parser.add_argument("--output", default=UNSET, help="the page of several runs (default: comparison.html)")
    _add_workload(parser)
    given = parser.read_flags()
    environment.prepare(verbose=False)
    storage_path, reference = build(LookupConfig, given).storage_path, given.get("workload")
    runs = [find_run(run, storage_path) for run in given["runs"] or [None]]

    from mnist_ray.report import page
    from mnist_ray.sweep.picture import sections

    if len(runs) > 1:
        page.compare(runs, reference, storage_path, given.get("output", "comparison.html"))
    elif "output" in given:
        raise UsageError("--output is for the page of several runs; that of one is in the run's folder")
    else:
        page.write_again(runs[0], reference, storage_path, sections)


def export() -> None:
    """Write a trained model as a program of torch.export or ONNX."""
    parser = Parser(_about(export), ExportConfig, LookupConfig)
    _add_run(parser, "run")
    given = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.run.find import find
    from mnist_ray.tools.export import export as export_found

    found = find(given["run"], build(LookupConfig, given).storage_path, given.get("workload"))
    export_found(found, build(ExportConfig, given))


COMMANDS: dict[str, Callable[[], None]] = {
    command.__name__: command for command in (train, tune, evaluate, predict, view, report, export)
}


def main(command: str) -> NoReturn:
    """Run a command with the arguments of ``sys.argv``, and exit."""
    run(COMMANDS[command])


def program() -> None:
    """Run the command that the first argument names: ``mnist-ray train`` and so on."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"{PROGRAM} {name}"]
        main(name)
    wanted = name in ("-h", "--help")
    if not wanted:
        say(f"{PROGRAM}: error: there is no command {name}", file=sys.stderr)
    say(f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} …; each has --help", file=sys.stdout if wanted else sys.stderr)
    sys.exit(0 if wanted else 2)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job's main and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; a bug keeps its traceback."""
    signals.take_signals()
    print_whatever_it_is()
    status = signals.supervise(functools.partial(status_of, main))
    with contextlib.suppress(OSError):  # the reader has gone, or a disk is full: said already
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written and closed; to take torch and Ray apart would take most of a second


def status_of(main: Callable[[], None]) -> int:
    """Run a job's main; print its error, if there is one, and return the exit status."""
    try:
        main()
        sys.stdout.flush()
    except (UsageError, JobError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as interrupt:
        say(_text_of(interrupt), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        return 1
    except Exception:
        for line in traceback.format_exc().splitlines():
            say(line, file=sys.stderr)
        return 1
    return 0


def _text_of(interrupt: BaseException) -> str:
    """Return what an interrupt says, or the one before it that a second Ctrl-C has cut short."""
    if not str(interrupt) and isinstance(interrupt.__context__, KeyboardInterrupt):
        return _text_of(interrupt.__context__)
    return str(interrupt) or "interrupted"


def _about(command: Callable[[], None]) -> str:
    return command.__doc__ or ""


def _add_workload(parser: Parser, default: str = "where it was") -> None:
    where = f"where the workload's code is; default: {default}"
    parser.add_argument("--workload", metavar="FILE.py", default=UNSET, help=where)


def _add_run(parser: Parser, name: str) -> None:
    """Add the argument that names a run or a checkpoint, and ``--workload``."""
    options: dict[str, Any] = {"default": UNSET} if name.startswith("--") else {"nargs": "?"}
    parser.add_argument(
        name,
        metavar="CHECKPOINT_OR_RUN",
        help="a checkpoint's or a run's folder or URI, or a run's name; default: the newest run",
        **options,
    )
    _add_workload(parser)


def _workload_class(*config_classes: type) -> type[Workload]:
    """Return the workload of the run that the command line names, else of the newest; MNIST if none is known.

    Its settings are to become flags beside those of ``config_classes``, so it has to be known before all flags are.
    Raises UsageError.
    """
    peeked = peek("workload", "storage_path")
    if "workload" in peeked:
        return source.load(peeked["workload"])
    with contextlib.suppress(UsageError, argparse.ArgumentError):  # said when all flags are known
        run = peek_word("workload", *names_of(config_classes))
        storage_path = peeked.get("storage_path", LookupConfig().storage_path)
        return class_of(find_run(run, storage_path), storage_path)
    return source.load(source.DEFAULT)
