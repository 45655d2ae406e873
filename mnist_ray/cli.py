"""The commands of ``mnist-ray`` and ``jobs/``: each is one function, and its parameters are its settings.

The parser and its help follow from the function. Flags are read before torch and Ray are imported.
"""

from __future__ import annotations

import argparse
import bdb
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NoReturn, get_type_hints

from mnist_ray import api, config, layers, signals
from mnist_ray.cluster import environment
from mnist_ray.cluster.environment import spin_briefly_if_busy
from mnist_ray.config import ChangesConfig, ModelConfig, RunConfig
from mnist_ray.errors import JobError, UsageError, about_ray
from mnist_ray.flags import Parser, complete, peek, setting_in
from mnist_ray.job.job import Job, classes_of_job, read_job, resume_command_of
from mnist_ray.many.jobs import read_sweep, read_train
from mnist_ray.many.jobs import run as run_job
from mnist_ray.output import one_object, prepare_output, say, writing
from mnist_ray.process import usable_cores
from mnist_ray.report.run_files import settings_of
from mnist_ray.runs import find_run
from mnist_ray.schema import RESULT_FILE
from mnist_ray.settings import build, values_of
from mnist_ray.text import PROGRAM, VERSION

Command = Callable[..., Mapping[str, Any] | None]
"""A function of instances of settings classes. ``--json`` prints what it returns. If that has an ``error``, the command
exits with status 1."""


def train() -> dict[str, Any]:
    """Train a workload on Ray, evaluate it on the test set, and write the run's files."""
    if peek(config.WorkerConfig).get("num_workers") == 0:
        spin_briefly_if_busy(usable_cores())  # before this process imports torch, as the workload's file may
    return _result_of(run_job(read_train()).job)


def tune() -> dict[str, Any]:
    """Search settings with Ray Tune, and evaluate the best trial once."""
    many = run_job(read_sweep())
    return {"trials": many.table().rows, **_result_of(many.job)}


def evaluate(run: RunConfig, changes: ChangesConfig, evaluation: config.EvaluationConfig) -> dict[str, Any]:
    """Evaluate a checkpoint on the test set."""
    values = api.evaluate(**values_of(run, evaluation), **_changed(changes))
    return {f"test_{name}": value for name, value in values.items()}


def compare(runs: config.ComparisonConfig) -> dict[str, Any]:
    """Compare two runs: what differs, their figures, and which is better on the same test set."""
    comparison = api.compare(**values_of(runs))
    for line in str(comparison).splitlines():
        say(line)
    return comparison.to_dict()


def predict(model: ModelConfig, output: config.PredictionConfig, scale: config.ScaleConfig) -> dict[str, Any]:
    """Print a trained model's predictions for your own images, or write those for data at scale."""
    if bool(output.files) == bool(scale.input or scale.output):
        raise UsageError("name images or folders or, for data at scale, --input and --output")
    if output.files:
        found = api.find(**values_of(model))
        from mnist_ray.tools.predict import predict as predict_files  # imports torch

        return predict_files(found, output)
    workers = config.WorkerConfig(plain_ray=scale.plain_ray)
    with environment.prepared(workers, "mnist_ray.predictions.at_scale") as forking:
        from mnist_ray.predictions.at_scale import predict_at_scale

        return predict_at_scale(api.find(**values_of(model)), scale, forking)


def view(choice: config.ViewConfig, changes: ChangesConfig) -> None:
    """Show examples of a workload's data."""
    given = {"config": choice.config, **_changed(changes)}
    if choice.workload is not None:
        given["workload"] = choice.workload
    workload = read_job(given).workload
    from mnist_ray.tools.view import view as show

    show(workload, choice)


def report(run: RunConfig) -> None:
    """Rewrite the report of a run or a sweep."""
    storage_path = layers.storage_path(run.storage_path)
    folder = find_run(run.run, storage_path)
    from mnist_ray.report import page

    page.write_again(folder, run.workload, storage_path, resume_command_of(folder, settings_of(folder)))


def runs(choice: config.RunsConfig) -> dict[str, Any]:
    """List the runs in the storage: state, metrics, age, and how to resume."""
    from mnist_ray.tools.runs import runs as list_runs

    return list_runs(layers.storage_path(choice.storage_path), choice)


def export(run: RunConfig, changes: ChangesConfig, output: config.ExportConfig) -> None:
    """Write a trained model as a program of torch.export or for ONNX, or its weights."""
    found = api.find(**values_of(run), changes=_changed(changes))
    from mnist_ray.report.export import export as write_program  # imports torch

    write_program(found, output)


def new(project: config.ProjectConfig) -> None:
    """Make a folder with a project of your own that uses this package."""
    from mnist_ray.tools.new import new as make_project

    make_project(project)


_ALL = (train, tune, evaluate, compare, predict, view, report, runs, export, new)
COMMANDS: dict[str, Command] = {command.__name__: command for command in _ALL}


def classes_of(command: Command) -> list[type]:
    """Return the classes of a command's settings; none for ``train`` and ``tune``, whose settings their job reads."""
    hints = get_type_hints(command)
    returned = hints.pop("return", NoneType)
    return [*hints.values(), config.JsonConfig] if hints and returned is not NoneType else [*hints.values()]


def call(command: Command) -> None:
    """Call a command with the settings of the command line; with ``--json``, print what it returns as one object."""
    with one_object(is_wanted="--json" in sys.argv[1:]) as shown:
        classes = classes_of(command)
        flags = Parser(command.__doc__ or "", *classes).read_flags() if classes else {}
        returned = command(*(build(one, flags) for one in classes if one is not config.JsonConfig))
        shown |= returned or {}
    if "error" in shown:
        raise JobError(shown["error"])


def program() -> None:
    """Run the command that the first argument names: ``mnist-ray train`` and so on."""
    if "_ARGCOMPLETE" in os.environ:
        classes = {name: classes_of(command) or classes_of_job(name) for name, command in COMMANDS.items()}
        complete({name: Parser("", *found, add_help=False) for name, found in classes.items()})
    lines = [f"  {name:<9} {command.__doc__}" for name, command in COMMANDS.items()]
    about = "Train, tune and evaluate PyTorch models on Ray. Each command has --help."
    parser = Parser("\n".join([about, "", "commands:", *lines]))
    parser.usage = "%(prog)s COMMAND [FLAGS]"
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    sys.argv[:2] = [f"{PROGRAM} {name}"]
    run(COMMANDS[name])


def run(command: Command) -> NoReturn:
    """Run a command and exit with its status: 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    signals.take_signals()
    prepare_output()
    status = status_of(signals.supervise)
    if signals.is_supervised():  # this process is the child, and does the work
        try:
            status = status_of(lambda: call(command))
        finally:
            signals.if_ended(signals.DONE)
    with contextlib.suppress(OSError):  # a closed pipe or a full disk, already reported
        sys.stdout.flush()
    sys.stderr.flush()
    if "multiprocessing" in sys.modules:
        for process in sys.modules["multiprocessing"].active_children():  # of the user's code
            if process.daemon:  # as Python's own exit would
                process.terminate()
    os._exit(status)  # all files are closed; unloading torch and Ray would take most of a second


def status_of(main: Callable[[], int | None]) -> int:
    """Run a command; print its error, if any, and return the exit status. Only a bug prints a traceback."""
    try:
        status = main() or 0
        with writing():
            sys.stdout.flush()
    except (UsageError, JobError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, bdb.BdbQuit) as interrupt:  # the latter if the user has left a debugger
        first = interrupt.__context__  # holds the message if a second Ctrl-C came before the exit
        said = first if isinstance(first, KeyboardInterrupt) and not str(interrupt) else interrupt
        say(str(said) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output is gone, as in `… | head`
        return 1
    except Exception as error:
        known = about_ray(error)
        for line in [f"error: {known}"] if known else traceback.format_exc().splitlines():
            say(line, file=sys.stderr)
        return 1
    return status


def _result_of(job: Job) -> dict[str, Any]:
    """Return the content of a run's result.json, with its folder; nothing after ``--dry-run``."""
    result = job.run.read_json(RESULT_FILE)
    return {} if result is None else {"run": job.run.uri, **result}


def _changed(changes: ChangesConfig) -> dict[str, Any]:
    return dict(map(setting_in, changes.set))
