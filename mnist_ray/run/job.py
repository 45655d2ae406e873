"""A job's settings and its folder. Imports neither torch nor Ray, to report wrong settings at once."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_ray import settings, storage
from mnist_ray.config import OutputConfig, SweepConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError, command, count, masked
from mnist_ray.ray_versions import check_workers
from mnist_ray.settings import UNSET, Parser, flag, peek
from mnist_ray.storage import CONFIG_FILE, ORIGIN_FILE, RESULT_FILE, SWEEP_FILE, TRIALS_FILE, RunFolder, find_run
from mnist_ray.trackers import Tracker
from mnist_ray.training.callback import Callback
from mnist_ray.workload import loading, user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import SourceCode

Given = Mapping[str, Any]
"""Settings by name, from flags or keyword arguments, including ``workload``, ``recipe`` and ``config``."""
_OF_RAY = {  # settings that do nothing with --num-workers 0
    *("min_workers", "placement", "label_selector", "autoscaling"),
    *("max_failures", "fork_workers", "plain_ray", "hang_timeout_s"),
}
_DESCRIPTIONS = {
    "train": "Train a workload on Ray, evaluate it on the test set, and write the run's files.",
    "tune": "Search settings with Ray Tune, train with the best and evaluate once on the test set. A trial has one "
    "worker with one CPU, unless --num-workers and --cpus-per-worker say otherwise.",
}


@dataclass(frozen=True)
class Job:
    """All settings of a training run."""

    workload: Workload
    train: TrainConfig
    workers: WorkerConfig
    output: OutputConfig
    run: RunFolder
    resume_with: str  # the command that resumes the run; or the Python call, if a call started the run
    callbacks: tuple[SourceCode, ...] = ()  # the user's code in the training loop
    initial: RunFolder | None = None  # the folder of INITIAL_FILE, with --init-from
    asked: Given = dataclasses.field(default_factory=dict)  # all settings, including a sweep's
    given: frozenset[str] = frozenset()  # the names of the settings that this command or call gives
    origin: Given = dataclasses.field(default_factory=dict)  # a resumed run's origin.json
    notes: tuple[str, ...] = ()  # printed before the job starts

    @property
    def values(self) -> dict[str, Any]:
        """The content of config.json."""
        own = settings.values_of(self.train, self.workload.settings, self.workers)
        return {"workload": self.workload.source.reference, **own}

    @property
    def code_folders(self) -> list[Path]:
        """The folders of the user's code."""
        return [code.folder for code in (*self.callbacks, self.workload.source)]

    def with_values(self, values: Given) -> Job:
        """Return the job with these values for settings of the training and the workload. Raises UsageError."""
        workload, all_values = self.workload, {**self.values, **values}
        changed = type(workload)(settings.build(workload.Settings, all_values), workload.metadata)
        train = settings.build(TrainConfig, all_values)
        _check_together(train, self.workers)
        return dataclasses.replace(self, workload=changed, train=train)


def _merged(layers: Mapping[str, Given]) -> dict[str, Any]:
    """Return the settings of all layers in one dictionary; later layers win."""
    return {name: value for layer in layers.values() for name, value in layer.items()}


def _layer_of(name: str, layers: Mapping[str, Given]) -> str:
    """Return the name of the layer that decides a setting; empty if no layer has the setting."""
    return ["", *(place for place, layer in layers.items() if name in layer)][-1]


def read_job(given: Given | None = None, kind: str = "train") -> Job:
    """Read the settings of ``train`` or ``tune`` from ``given``, or from the command line if it is None.

    Later layers win: default recipe or saved run, recipe, config file, flags. Raises UsageError and JobError.
    """
    config_file, more_settings = (SWEEP_FILE, [SweepConfig]) if kind == "tune" else (CONFIG_FILE, [])
    early = peek("workload", "config", "resume", "run_name", "storage_path")[0] if given is None else given
    run, saved = _find_run(early, kind, config_file)
    untrusted = storage.untrusted_folders(run, run.storage_path)
    resumed, file = {run.inside(config_file).uri: saved} if saved else {}, dict[str, Given]()
    if "config" in early:
        file[early["config"]] = settings.read_config_file(early["config"])
        folder = settings.path_of(early["config"], "--config").absolute().parent
        untrusted += storage.untrusted_folders(storage.locate(str(folder.parent), folder.name), run.storage_path)
    files: dict[str, Given] = {**resumed, **file}
    reference = _merged(files).get("workload") or loading.DEFAULT
    workload_class = loading.load_again(reference, early.get("workload"), _layer_of("workload", files), untrusted)

    kept = (*more_settings, TrainConfig, workload_class.Settings, WorkerConfig)
    classes, recipes = (*kept, OutputConfig), workload_class.recipes
    flags = _read_flags(kind, classes, recipes) if given is None else _checked(given, classes, recipes)
    _check_files(files, kept)
    layers: dict[str, Given] = {
        "the default recipe": {} if saved else recipes.get("default", {}),
        **resumed,
        "the recipe": recipes.get(flags.get("recipe", ""), {}),
        **file,
        "the flags": flags,
    }
    asked = _merged(layers)
    if asked.get("callback") is not None and (place := _layer_of("callback", layers)) in files:
        user_code.check_trusted(asked["callback"], Callback, place, untrusted)

    job = _job_of(kind, workload_class, run, asked, frozenset(flags), is_call=given is not None)
    if not saved:
        check_free(run, resume=False)
        return job
    resolved = {**asked, "init_from": job.train.init_from, "callback": job.train.callback}
    _check_unchanged(run, (*more_settings, TrainConfig, workload_class.Settings), saved, resolved)
    origin, notes = _left_by(run, kind, workload_class)
    return dataclasses.replace(job, origin=origin, notes=notes)


def _job_of(
    kind: str, workload_class: type[Workload], run: RunFolder, asked: Given, given: frozenset[str], *, is_call: bool
) -> Job:
    """Return the job that the settings in ``asked`` describe. Raises UsageError."""
    train, workers = _in_steps(settings.build(TrainConfig, asked), given), settings.build(WorkerConfig, asked)
    output = settings.build(OutputConfig, asked)
    if output.tracker is not None:
        user_code.find(output.tracker, Tracker)
    _check_together(train, workers)
    for name in sorted(given & _OF_RAY) if workers.num_workers == 0 else ():
        raise UsageError(f"{flag(name)} has no effect with --num-workers 0, which trains without Ray; leave it out")
    check_workers(workers)
    if kind == "train" and workload_class.create_optimizer is Workload.create_optimizer:
        for name in sorted(given & train.unused):
            raise UsageError(f"{flag(name)} has no effect: {train.optimizer} does not use it; leave it out")
    code = {"workload": workload_class.source}
    if train.callback is not None:
        code["callback"] = user_code.find(train.callback, Callback).source
        train = dataclasses.replace(train, callback=code["callback"].reference)
    if train.init_from is not None and (not output.resume or "init_from" in given):  # else it is resolved already
        place = find_run(train.init_from, run.storage_path)
        if not output.resume and not place.exists():  # a resumed run has its own copy of the weights
            raise UsageError(f"--init-from {train.init_from}: there is no such run, checkpoint or file")
        train = dataclasses.replace(train, init_from=masked(place.uri))  # a path that is right in any folder
    folders = storage.untrusted_folders(run, run.storage_path)
    references = {name: source.reference for name, source in code.items()}
    more = {name: reference for name, reference in references.items() if user_code.why_untrusted(reference, folders)}
    if output.tracker is not None:
        more = {"tracker": output.tracker, **more}
    return Job(
        workload=workload_class(settings.build(workload_class.Settings, asked)),
        train=train,
        workers=workers,
        output=output,
        run=run,
        resume_with=resume_command(kind, run, more, is_call=is_call),
        callbacks=tuple(code[name] for name in code if name == "callback"),
        initial=None if train.init_from is None else run,
        asked=asked,
        given=given,
    )


def _in_steps(train: TrainConfig, given: frozenset[str]) -> TrainConfig:
    """Return settings whose epochs are those of --num-steps, if it is set. Raises UsageError."""
    if train.num_steps is None:
        if train.validate_every is not None:
            raise UsageError("--validate-every needs --num-steps; without it, each pass over the data is validated")
        return train
    if "num_epochs" in given:
        both = "leave one of them out" if "num_steps" in given else "leave that out, or add --num-steps none"
        raise UsageError(f"--num-steps {train.num_steps} takes the place of --num-epochs; {both}")
    every = min(train.validate_every or math.ceil(train.num_steps / 10), train.num_steps)
    return dataclasses.replace(train, validate_every=every, num_epochs=math.ceil(train.num_steps / every))


def resume_command(kind: str, run: RunFolder, more: Mapping[str, str] | None = None, *, is_call: bool = False) -> str:
    """Return the command or Python call that resumes a run of ``kind``, with ``more`` settings and without secrets."""
    values = {"run_name": run.name, "storage_path": masked(run.storage_path), **(more or {})}
    if is_call:
        return f"{kind}(resume=True, {', '.join(f'{name}={value!r}' for name, value in values.items())})"
    words = [word for name, value in values.items() for word in (flag(name), value)]
    return f"{command(kind)} {shlex.join(['--resume', *words])}"


def _find_run(early: Given, kind: str, config_file: str) -> tuple[RunFolder, dict[str, Any]]:
    """Return a job's folder, and a resumed run's settings. Raises UsageError; JobError if the settings are damaged."""
    output = settings.build(OutputConfig, early)
    if output.resume and output.run_name is None:
        raise UsageError("--resume needs --run-name NAME")
    new_name = f"{kind}_{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}"  # unique even within a second
    run = storage.locate(output.storage_path, output.run_name or new_name)
    if not output.resume:
        return run, {}
    with storage.in_one_line(f"cannot read {run.uri}"):
        is_there = run.exists(config_file)
    if not is_there:
        raise UsageError(f"--resume: there is no run of {kind} in {run.uri}; check --run-name and --storage-path")
    check_free(run, resume=True)
    return run, run.require_json(config_file)


def check_free(run: RunFolder, *, resume: bool) -> None:
    """Raise UsageError if a new run exists already, or a resumed run is finished."""
    if resume and run.read_json(RESULT_FILE) is not None:
        raise UsageError(f"--resume: run {run.name} is finished; its result is in {run.inside(RESULT_FILE).uri}")
    if not resume and run.exists():
        raise UsageError(f"run {run.uri} exists already; add --resume to continue it, or give another --run-name")


def _left_by(run: RunFolder, kind: str, workload_class: type[Workload]) -> tuple[Given, tuple[str, ...]]:
    """Return a resumed run's origin, and notes for the user."""
    notes: list[str] = []
    origin = run.read_json(ORIGIN_FILE) or {}
    if not (run.exists(TRIALS_FILE) if kind == "tune" else run.checkpoint_names()):
        missing = "finished trial" if kind == "tune" else "checkpoint"
        notes.append(f"run {run.name} has no {missing} yet; starting from the beginning")
    if origin.get("workload_sha256") not in (None, workload_class.source.sha256):
        notes.append(f"the workload has changed since the run was started: {workload_class.source.reference}")
    return origin, tuple(notes)


def _check_files(files: Mapping[str, Given], classes: Sequence[type]) -> None:
    """Raise UsageError, with the file's name, if a setting is unknown or wrong."""
    for file, values in files.items():
        settings.check_known(values, settings.names_of(classes) | {"workload"}, file)
        try:
            for config_class in classes:
                settings.checked(config_class, values)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error


def _read_flags(kind: str, classes: Sequence[type], recipes: Mapping[str, Given]) -> dict[str, Any]:
    parser = Parser(_DESCRIPTIONS[kind], *classes, defaults=recipes.get("default", {}))
    workload_help = "the workload: FILE.py or package.module, with :NAME if there are several in it; default: MNIST"
    recipe_help = "a named set of settings, which flags override"
    parser.add_argument("--workload", metavar="FILE.py", default=UNSET, help=workload_help)
    parser.add_argument("--recipe", choices=recipes or ["default"], default=UNSET, help=recipe_help)
    parser.add_argument("--config", metavar="FILE", default=UNSET, help="settings from a run's config.json")
    given = [word.partition("=")[0] for word in sys.argv]
    for name in ("--callback", "--tracker", "--recipe", "--config"):
        if given.count(name) > 1:
            raise UsageError(f"{name} is given twice, but only one can have an effect; leave the others out")
    return parser.read_flags()


def _checked(given: Given, classes: Sequence[type], recipes: Mapping[str, Any]) -> dict[str, Any]:
    settings.check_known(given, settings.names_of(classes) | {"workload", "recipe", "config"}, "the call")
    if given.get("recipe", "default") not in (*recipes, "default"):
        raise UsageError(f"there is no recipe {given['recipe']}; known: {', '.join(recipes) or 'none'}")
    return dict(given)


def _check_together(train: TrainConfig, workers: WorkerConfig) -> None:
    """Raise UsageError if settings do not go together."""
    if train.schedule == "one-cycle" and train.warmup_steps:
        raise UsageError("--warmup-steps: one-cycle has its own warm-up; choose another --schedule")
    if train.strategy == "fsdp" and train.compile:
        raise UsageError("--strategy fsdp does not go with --compile, which cannot trace how units are gathered")
    if train.recompute_activations and train.compile:
        raise UsageError("--recompute-activations does not go with --compile, which cannot trace it")
    if train.reproducible_chunks is None:
        return
    number = workers.num_workers or 1
    share = f"--reproducible: {number} workers cannot share {count(train.reproducible_chunks, 'chunk')} of a batch"
    conflicts = {
        f"{share}; lower --num-workers, or start a run with more --num-chunks": number > train.reproducible_chunks,
        "--reproducible computes on CPUs only; leave --use-gpu out": workers.use_gpu == "yes",
        "--reproducible adds up whole gradients in a fixed order; use --strategy ddp": train.strategy == "fsdp",
        "--reproducible computes a chunk at a time; take more --num-chunks, not --micro-batch-size": (
            train.micro_batch_size is not None
        ),
        "--reproducible does not go with --compile, whose kernels may give different bits": train.compile,
    }
    for conflict, is_there in conflicts.items():
        if is_there:
            raise UsageError(conflict)


def _has_moved(field: dataclasses.Field[Any], old: Any, new: Any) -> bool:
    """Tell whether two values name the same file or folder in two places; of data, the digests are compared, too."""
    are_places = isinstance(old, (str, Path)) and isinstance(new, (str, Path))
    if are_places and field.name == "callback":  # which older runs have without its class
        return Path(old).name in (Path(new).name, Path(new).name.rpartition(":")[0])
    if not are_places or Path(old).name != Path(new).name:
        return False
    return os.path.exists(new) and (field.metadata.get("decides_data", False) or not os.path.exists(old))


def _check_unchanged(run: RunFolder, classes: Sequence[type], then: Given, now: Given) -> None:
    """Raise UsageError if a resumed run's settings have changed, except those that do not affect the weights."""
    for config_class in classes:
        before: Any = settings.build(config_class, then)
        after: Any = settings.build(config_class, now)
        for field in dataclasses.fields(config_class):
            name, old, new = field.name, getattr(before, field.name), getattr(after, field.name)
            if field.metadata.get("decides_weights", True) and old != new and not _has_moved(field, old, new):
                raise UsageError(
                    f"--resume: run {run.name} was started with {flag(name)} {old}, not {new}; "
                    "leave the flag out, or start another run"
                )
