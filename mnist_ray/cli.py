"""The commands of ``mnist-ray`` and ``jobs/``. They read their flags before they import torch and Ray."""

from __future__ import annotations

import argparse
import bdb
import contextlib
import functools
import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mnist_ray import api, config, layers, signals
from mnist_ray.cluster import environment
from mnist_ray.cluster.environment import spin_briefly_if_busy
from mnist_ray.errors import JobError, UsageError, about_limit, about_ray
from mnist_ray.job.job import Job, load_trusted, resume_command
from mnist_ray.many.jobs import read_sweep, read_train
from mnist_ray.many.jobs import run as run_job
from mnist_ray.output import one_object, prepare_output, say, writing
from mnist_ray.process import usable_cores
from mnist_ray.report.run_files import settings_of, workload_of
from mnist_ray.runs import find_run, is_sweep
from mnist_ray.settings import UNSET, Given, Parser, build, declared, peek
from mnist_ray.settings_files import read_settings
from mnist_ray.storage import CONFIG_FILE, RESULT_FILE, STORAGE_ERRORS, locate
from mnist_ray.text import PROGRAM, VERSION
from mnist_ray.workload import loading
from ray_fork.starting import prepared_forking


def train() -> None:
    """Train a workload on Ray, evaluate it on the test set, and write the run's files."""
    if peek(config.WorkerConfig)[0].get("num_workers") == "0":
        spin_briefly_if_busy(usable_cores())  # before this process imports torch, as the workload's file may
    with _one_object(config.OutputConfig) as shown:
        shown |= _result_of(run_job(read_train()).job)


def tune() -> None:
    """Search settings with Ray Tune, and evaluate the best trial once."""
    with _one_object(config.OutputConfig) as shown:
        many = run_job(read_sweep())
        shown |= {"trials": many.table().rows, **_result_of(many.job)}


def evaluate() -> None:
    """Evaluate a checkpoint on the test set."""
    with _one_object(config.EvaluationConfig) as shown:
        flags = _flags_of_run(evaluate, config.EvaluationConfig)
        flags.pop("json", None)
        shown |= {f"test_{name}": value for name, value in api.evaluate(flags.pop("run"), **flags).items()}


def predict() -> None:
    """Print a trained model's predictions for your own images."""
    parser = _parser(predict, config.PredictionConfig, config.ScaleConfig)
    _add_run(parser, "--run", default=None)
    help_text = "images, or folders of images; for a language model, texts to continue"
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="*", help=help_text)
    flags = _over_files(parser.read_flags(), config.PredictionConfig, config.ScaleConfig)
    options, scale = build(config.PredictionConfig, flags), build(config.ScaleConfig, flags)
    if bool(flags["images"]) == bool(scale.input or scale.output):
        raise UsageError("name images or folders or, for data at scale, --input and --output")
    find = functools.partial(api.find, flags["run"], flags.get("workload"), flags["storage_path"])
    if flags["images"]:
        _tool("predict")(flags["images"], find(), options)
        return
    if options.grid:
        raise UsageError("--grid draws IMAGE_OR_FOLDER; it does not go with --input")
    with one_object(is_wanted=options.json) as shown:
        environment.prepare(verbose=False, plain=scale.plain_ray)
        with prepared_forking("mnist_ray.predictions.at_scale", is_wanted=not scale.plain_ray) as forking:
            from mnist_ray.predictions.at_scale import predict_at_scale

            shown |= predict_at_scale(find(), scale, options.threshold, forking)


def view() -> None:
    """Show examples of a workload's data."""
    early = peek(config.SourceConfig)[0]
    file = read_settings(early["config"]) if "config" in early else None
    places = _places(early)
    _over(places, early, config.SourceConfig)  # checks them
    storage = locate(layers.storage_path(), "")
    workload_class = load_trusted("train", storage, early, layers.Layers(places), file)
    parser = Parser(view.__doc__ or "", config.ViewConfig, workload_class.Settings)
    _add_workload(parser, "MNIST")
    _add_config(parser)
    flags = _over(places, parser.read_flags(), config.ViewConfig, of_workload=workload_class.Settings)
    _tool("view")(workload_class(build(workload_class.Settings, flags)), build(config.ViewConfig, flags))


def report() -> None:
    """Rewrite the report of a run or a sweep."""
    parser = _parser(report)
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's name, folder or URI; default: the newest run")
    flags = _over_files(parser.read_flags())
    run = find_run(flags["run"], flags["storage_path"])

    from mnist_ray.report import page

    output = config.OutputConfig(run_name=run.name, storage_path=run.storage_path)
    resume_with = resume_command("tune" if is_sweep(settings_of(run)) else "train", output)
    page.write_again(run, flags.get("workload"), flags["storage_path"], resume_with)


def compare() -> None:
    """Compare two runs: what differs, their figures, and which is better on the same test set."""
    with _one_object(config.ComparisonConfig) as shown:
        parser = Parser(compare.__doc__ or "", config.ComparisonConfig)
        _add_storage(parser)
        parser.add_argument("first", metavar="RUN", help="a run's name, folder or URI: A")
        parser.add_argument("second", metavar="RUN", help="the run to compare with it: B")
        flags = _over_files(parser.read_flags(), config.ComparisonConfig)
        comparison = api.compare(flags["first"], flags["second"], storage_path=flags["storage_path"])
        for line in str(comparison).splitlines():
            say(line)
        shown |= comparison.to_dict()


def runs() -> None:
    """List the runs in the storage: state, metrics, age, and how to resume."""
    parser = Parser(runs.__doc__ or "", config.RunsConfig)
    _add_storage(parser)
    flags = _over_files(parser.read_flags(), config.RunsConfig)
    _tool("runs")(flags["storage_path"], build(config.RunsConfig, flags))


def export() -> None:
    """Write a trained model as a program of torch.export."""
    flags = _flags_of_run(export, config.ExportConfig)
    found = api.find(flags["run"], flags.get("workload"), flags["storage_path"], changes=flags)
    from mnist_ray.checkpoints import export as tool  # imports torch

    tool.export(found, build(config.ExportConfig, flags))


def new() -> None:
    """Make a folder with a project of your own that uses this package."""
    parser = Parser(new.__doc__ or "", config.ProjectConfig)
    parser.add_argument("name", metavar="NAME", help="the folder to make; the workload has its name in CamelCase")
    flags = parser.read_flags()
    _tool("new")(flags["name"], build(config.ProjectConfig, flags))


_ALL = (train, tune, evaluate, compare, predict, view, report, runs, export, new)
COMMANDS: dict[str, Callable[[], None]] = {command.__name__: command for command in _ALL}


def program() -> None:
    """Run the command that the first argument names: ``mnist-ray train`` and so on."""
    lines = [f"  {name:<11} {command.__doc__}" for name, command in COMMANDS.items()]
    about = "Train, tune and evaluate PyTorch models on Ray. Each command has --help."
    parser = Parser("\n".join([about, "", "commands:", *lines]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands above")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    sys.argv[:2] = [f"{PROGRAM} {name}"]
    run(COMMANDS[name])


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit with its status: 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    signals.take_signals()
    prepare_output()
    status = status_of(signals.supervise)
    if signals.is_supervised():  # this process is the child, and does the work
        try:
            status = status_of(main)
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


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError("the current folder has been deleted; change to another one") from error


def status_of(main: Callable[[], int | None]) -> int:
    """Run a command; print its error, if any, and return the exit status. Only a bug prints a traceback."""
    try:
        _check_current_folder()
        status = main() or 0
        with writing():
            sys.stdout.flush()
    except (UsageError, JobError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as interrupt:
        first = interrupt.__context__  # holds the message if a second Ctrl-C came before the exit
        said = first if isinstance(first, KeyboardInterrupt) and not str(interrupt) else interrupt
        say(str(said) or "interrupted", file=sys.stderr)
        return 130
    except bdb.BdbQuit:  # the user has left a debugger
        say("quit", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output is gone, as in `… | head`
        return 1
    except Exception as error:
        known = about_ray(error) or about_limit(error)
        for line in [f"error: {known}"] if known else traceback.format_exc().splitlines():
            say(line, file=sys.stderr)
        return 1
    return status


def _tool(name: str) -> Callable[..., Any]:
    """Return the function of ``mnist_ray.tools`` that does a command's work; its module imports torch or matplotlib."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"mnist_ray.tools.{name}"), name)
    return function


def _flags_of_run(command: Callable[[], None], config_class: type) -> dict[str, Any]:
    """Return the flags of a command that loads a run's data; the settings of the run's workload are flags, too."""
    early, words = peek(config.SourceConfig, config.OutputConfig, config_class)
    workload_class = loading.load(early.get("workload", loading.DEFAULT))
    if "workload" not in early:
        with contextlib.suppress(UsageError, JobError, *STORAGE_ERRORS):  # reported when the checkpoint is read
            storage_path = layers.storage_path(early.get("storage_path"))
            folder = find_run(run_among(words), storage_path)
            known = [place for place in (folder, folder.storage) if place.exists(CONFIG_FILE)]  # also of a checkpoint
            # If there is none, the word may be the value of a flag that is not yet known.
            run_folder = known[0] if known else find_run(None, storage_path)
            workload_class = type(workload_of(run_folder, None, storage_path))
    parser = _parser(command, config_class, workload_class.Settings)
    _add_run(parser, "run", nargs="?")
    return _over_files(parser.read_flags(), config_class)


def _over_files(flags: dict[str, Any], *classes: type) -> dict[str, Any]:
    """Return the flags over the settings in files and in the environment: those of ``classes``, and the storage."""
    return _over(_places(flags), flags, *classes)


def _places(flags: dict[str, Any]) -> dict[str, Given]:
    """Return the settings in files and in the environment by their place; print what is ignored of them."""
    places, notes = layers.defaults()
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    if "config" in flags:
        file = read_settings(flags.pop("config"))
        places[file.path] = file.values
    return places


def _over(
    places: Mapping[str, Given], flags: dict[str, Any], *classes: type, of_workload: type | None = None
) -> dict[str, Any]:
    """Return the flags over the settings of ``places``: those of ``classes``, and the storage.

    A run keeps its workload's settings, so only ``of_workload`` takes them from files.
    """
    layers.check_files(places, [*classes, config.OutputConfig])
    if of_workload is not None:
        places = layers.with_workload(places, [*classes, config.OutputConfig], of_workload)
        classes = (*classes, of_workload)
    names = {*declared(*classes), "storage_path"}
    given = {name: value for name, value in layers.Layers(places).values.items() if name in names}
    return {"storage_path": config.OutputConfig().storage_path, **given, **flags}


def _one_object(config_class: type) -> contextlib.AbstractContextManager[dict[str, Any]]:
    return one_object(is_wanted=peek(config_class)[0].get("json", False))


def _result_of(job: Job) -> dict[str, Any]:
    """Return what ``--json`` prints of a run; nothing after ``--dry-run``."""
    result = job.run.read_json(RESULT_FILE)
    return {} if result is None else {"run": job.run.uri, **result}


def run_among(words: Sequence[str]) -> str | None:
    """Return the word that names a run, if any, among flags that are not known yet and their values.

    A word after such a flag may be its value, so it is taken for the name only if there is no other candidate.
    """
    pairs = [(before, word) for before, word in itertools.pairwise(["", *words]) if not word.startswith("-")]
    pairs.sort(key=lambda pair: pair[0].startswith("-") and "=" not in pair[0])
    return next((word for _, word in pairs), None)


def _parser(command: Callable[[], None], *classes: type) -> Parser:
    """Return the parser of a command that works with a run."""
    parser = Parser(command.__doc__ or "", *classes)
    _add_storage(parser)
    _add_workload(parser, "the run's workload")
    return parser


def _add_storage(parser: Parser) -> None:
    where = f"folder or URI of the runs (default: {layers.storage_path()})"
    parser.add_argument("--storage-path", default=UNSET, help=where)
    _add_config(parser)


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", default=UNSET, help=declared(config.SourceConfig)["config"].help)


def _add_workload(parser: Parser, default: str) -> None:
    workload_help = f"FILE.py or package.module of the workload; default: {default}"
    parser.add_argument("--workload", metavar="FILE.py", default=UNSET, help=workload_help)


def _add_run(parser: Parser, name: str, **options: Any) -> None:
    run_help = "a run's name, or the folder or URI of a run or a checkpoint; default: the newest run"
    parser.add_argument(name, metavar="CHECKPOINT_OR_RUN", help=run_help, **options)
