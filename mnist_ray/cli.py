"""The commands: ``jobs/`` and ``mnist-ray`` run these. Each reads its flags, then imports what it needs.

Nothing here imports torch or Ray, so that a wrong flag is answered at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from mnist_ray import api, signals
from mnist_ray.cluster import environment
from mnist_ray.config import EvaluationConfig, ExportConfig, LookupConfig, PredictionConfig, ViewConfig
from mnist_ray.errors import PROGRAM, JobError, UsageError, print_whatever_it_is, say
from mnist_ray.flags import UNSET, Parser, peek
from mnist_ray.run.job import read_job, way_on
from mnist_ray.run.lookup import class_of, find_run
from mnist_ray.run.train import train as train_job
from mnist_ray.settings import build, names_of
from mnist_ray.storage import TRIALS_FILE
from mnist_ray.sweep.options import read_sweep
from mnist_ray.sweep.tune import tune as tune_sweep
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload


def train() -> None:
    """Train a workload on Ray, evaluate it on the test set, and write the run's files."""
    train_job(read_job())


def tune() -> None:
    """Search the settings that have a search space with Ray Tune, train the best and evaluate it once."""
    tune_sweep(read_sweep())


def evaluate() -> None:
    """Evaluate a checkpoint on the test set."""
    workload_class = _class_of_run(EvaluationConfig, LookupConfig)
    parser = _parser(evaluate, "checkpoint", EvaluationConfig, workload_class.Settings, LookupConfig)
    given = parser.read_flags()
    api.evaluate(given.pop("checkpoint"), **given)


def predict() -> None:
    """Print a trained model's predictions for your own pictures."""
    parser = _parser(predict, "--run", PredictionConfig, LookupConfig)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="pictures, or folders of them")
    given = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.tools import predict as tool

    storage_path, reference = build(LookupConfig, given).storage_path, given.get("workload")
    found = api.find_checkpoint(given.get("run"), storage_path, reference, is_wanted=tool.takes_pictures)
    tool.predict(given["images"], found, build(PredictionConfig, given))


def view() -> None:
    """Look at the examples of a workload's data."""
    workload_class = loading.load(peek("workload")[0].get("workload", loading.DEFAULT))
    given = _parser(view, "", ViewConfig, workload_class.Settings, workload="MNIST").read_flags()

    from mnist_ray.tools.view import view as view_examples

    view_examples(workload_class(build(workload_class.Settings, given)), build(ViewConfig, given))


def report() -> None:
    """Make a run's report again, or compare several runs."""
    parser = _parser(report, "", LookupConfig)
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="a run's folder, URI or name, also a sweep's; default: the newest run"
    )
    parser.add_argument("--output", default=UNSET, help="the page of several runs (default: comparison.html)")
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
        resume_with = way_on("tune" if runs[0].exists(TRIALS_FILE) else "train", runs[0])
        page.write_again(runs[0], reference, storage_path, sections, resume_with)


def export() -> None:
    """Write a trained model as a program of torch.export or ONNX."""
    given = _parser(export, "run", ExportConfig, LookupConfig).read_flags()
    environment.prepare(verbose=False)
    found = api.find_checkpoint(given["run"], build(LookupConfig, given).storage_path, given.get("workload"))

    from mnist_ray.tools.export import export as export_found

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


def _parser(command: Callable[[], None], run: str, *classes: type, workload: str = "where it was") -> Parser:
    """Return a command's parser, with ``run``, an argument or a flag that names a run, and ``--workload``."""
    parser = Parser(command.__doc__ or "", *classes)
    if run:
        options: dict[str, Any] = {"default": UNSET} if run.startswith("--") else {"nargs": "?"}
        run_help = "a checkpoint's or a run's folder or URI, or a run's name; default: the newest run"
        parser.add_argument(run, metavar="CHECKPOINT_OR_RUN", help=run_help, **options)
    workload_help = f"where the workload's code is; default: {workload}"
    parser.add_argument("--workload", metavar="FILE.py", default=UNSET, help=workload_help)
    return parser


def _class_of_run(*classes: type) -> type[Workload]:
    """Return the workload of the run that the command line names, else of the newest; MNIST if none is known.

    Its settings are to become flags beside those of ``classes``, so it has to be known before all flags are. Raises
    UsageError.
    """
    early, run = peek("workload", *names_of(classes))
    if "workload" in early:
        return loading.load(early["workload"])
    with contextlib.suppress(UsageError):  # said when all flags are known
        storage_path = early.get("storage_path", LookupConfig().storage_path)
        return class_of(find_run(run, storage_path), storage_path)
    return loading.load(loading.DEFAULT)
