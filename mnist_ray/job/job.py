"""A job's settings and its folder. Imports neither torch nor Ray, to report wrong settings at once."""

from __future__ import annotations

import dataclasses
import math
import os
import pkgutil
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_ray import layers, runs, settings, storage
from mnist_ray.config import OutputConfig, SourceConfig, SweepConfig, TrainConfig, WorkerConfig, shown
from mnist_ray.errors import UsageError
from mnist_ray.layers import FLAGS, ONLY_FLAGS, Layers
from mnist_ray.ray_versions import check_workers
from mnist_ray.references import split_call
from mnist_ray.runs import find_run, is_sweep
from mnist_ray.settings import Given, Parser, Setting, declared, flag, peek
from mnist_ray.settings_files import SettingsFile, read_settings
from mnist_ray.storage import (
    CONFIG_FILE,
    MEMBERS_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    RunFolder,
)
from mnist_ray.text import PROGRAM, command, count, masked
from mnist_ray.workload import loading, user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import SourceCode

_OF_RAY = {  # settings that do nothing with --num-workers 0
    *("min_workers", "placement_strategy", "label_selector", "autoscaling"),
    *("max_failures", "fork_workers", "plain_ray", "hang_timeout_s", "max_concurrent_trials"),
}
_DECIDING: dict[str, tuple[type, ...]] = {"train": (TrainConfig,), "tune": (SweepConfig, TrainConfig)}
_DESCRIPTIONS = {
    "train": """\
Train a workload on Ray, evaluate it on the test set, and write the run's files:

    {command} --workload my_problem.py --num-workers 4""",
    "tune": """\
Search settings with Ray Tune, and evaluate the best trial once on the test set:

    {command} --num-trials 16 --sweep learning_rate=log:1e-3:1e-1 batch_size=64,128

A trial has one worker with one CPU, unless --num-workers or --cpus-per-worker is given.""",
}
_MOST_USED = (
    *("workload", "config", "num_epochs", "batch_size", "learning_rate", "num_workers", "use_gpu"),
    *("run_name", "storage_path", "resume", "dry_run", "callback", "tracker"),
)
_OF_TUNING = ("sweep", "num_trials", "search_algorithm")


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
    layers: Layers = Layers({})
    is_resumed: bool = False
    is_finished: bool = False  # with --resume auto
    origin: Given = dataclasses.field(default_factory=dict)  # a resumed run's origin.json
    notes: tuple[str, ...] = ()  # printed before the job starts

    @property
    def asked(self) -> dict[str, Any]:
        """All settings that a place gives, including a sweep's."""
        return self.layers.values

    @property
    def given(self) -> frozenset[str]:
        """The names of the settings that this command or call gives."""
        return frozenset(self.layers.places.get(FLAGS, ()))

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


def read_job(given: Given | None = None, kind: str = "train") -> Job:
    """Read the settings of ``train`` or ``tune`` from ``given``, or from the command line if it is None.

    Choose the run, check that its code is trusted, read flags and files into layers, build the job. Later layers win:
    recipes, the project, the environment, a resumed run's own settings, the file of --config, flags. Raises UsageError
    and JobError.
    """
    early = peek(*_classes(kind)) if given is None else given  # as text, and without the workload's own settings
    file = read_settings(early["config"]) if "config" in early else None
    of_file: dict[str, Given] = {file.path: file.values} if file else {}
    defaults, notes = layers.defaults()
    layers.check_files({**defaults, **of_file}, _classes(kind))
    run, saved = _choose_run(kind, Layers({**defaults, **of_file, FLAGS: early}).values)
    workload_class = load_trusted(kind, run, early, Layers({**defaults, **saved, **of_file}), file)
    flags = _read_flags(kind, workload_class, given)
    defaults, of_file = (
        layers.with_workload(places, _classes(kind), workload_class.Settings) for places in (defaults, of_file)
    )
    _check_saved(saved, _classes(kind, workload_class.Settings))
    ordered = layers.in_order(workload_class.recipes, defaults, saved, of_file, flags)
    job = _build_job(kind, run, workload_class, ordered, is_resumed=bool(saved), is_call=given is not None)
    job = dataclasses.replace(job, notes=tuple(notes))
    _check_used(kind, job)
    if not saved:
        check_free(run, resume=job.output.resume)  # after all mistakes, and --help
        return job
    _check_unchanged(kind, job, saved, ordered)
    if job.output.resume == "auto" and run.read_json(RESULT_FILE) is not None:
        return dataclasses.replace(job, is_finished=True)
    return _with_origin(job)


def _classes(kind: str, *of_workload: type) -> list[type]:
    """Return the classes of the settings of ``train`` or ``tune``."""
    return [*_DECIDING[kind], *of_workload, WorkerConfig, OutputConfig, SourceConfig]


def _choose_run(kind: str, early: Given) -> tuple[RunFolder, dict[str, Given]]:
    """Return a job's folder, and a resumed run's settings by their file; empty for a new run. Raises like read_job."""
    output = settings.build(OutputConfig, early)
    if output.resume != "no" and output.run_name is None:
        raise UsageError("--resume needs --run-name NAME")
    run = storage.locate(output.storage_path, output.run_name or storage.new_name(kind))
    if output.resume == "no":
        return run, {}
    with storage.in_one_line(f"cannot read {run.uri}"):
        saved = run.read_json(CONFIG_FILE)
    if (saved is None and output.resume == "yes") or (saved is not None and is_sweep(saved) != (kind == "tune")):
        raise UsageError(f"--resume: there is no run of {kind} in {run.uri}; check --run-name and --storage-path")
    if saved is None:
        return run, {}
    check_free(run, resume=output.resume, is_resumed=True)
    return run, {run.inside(CONFIG_FILE).uri: saved}


def check_free(run: RunFolder, *, resume: str, is_resumed: bool = False) -> None:
    """Raise UsageError if a new run already exists, or a resumed run is finished; with ``auto``, it may be."""
    if is_resumed:
        is_finished = run.read_json(RESULT_FILE) is not None
        if is_finished and resume != "auto":
            missing = report_command(run)
            advice = f"; for its report: {missing}" if missing else ""
            result = run.inside(RESULT_FILE).uri
            raise UsageError(f"--resume: run {run.name} is finished; its result is in {result}{advice}")
    # With auto, the folder may be that of a start that was killed before it had settings.
    elif run.exists(CONFIG_FILE if resume == "auto" else ""):
        raise UsageError(f"run {run.uri} already exists; add --resume to continue it, or give another --run-name")


def report_command(run: RunFolder) -> str:
    """Return the command that writes the report of a finished run; empty if it has one. A kill may have come before."""
    return "" if run.exists(REPORT_FILE) else f"{PROGRAM} report {shlex.quote(run.uri.rstrip('/'))}"


def load_trusted(kind: str, run: RunFolder, flags: Given, files: Layers, file: SettingsFile | None) -> type[Workload]:
    """Return the workload. Raises UsageError if only a file names code that may have come with a run."""
    folders = runs.untrusted_folders(run, run.storage_path)
    if file is not None:
        # The file may name another storage, but that does not make the code in the usual one trusted.
        usual, home = layers.storage_path(flags.get("storage_path")), Path(file.path).expanduser().absolute().parent
        folder = storage.locate(str(home.parent), home.name)
        is_of_run = file.is_of_run or folder.exists(CONFIG_FILE) or folder.exists(ORIGIN_FILE)
        folders += runs.untrusted_folders(folder if is_of_run else run, usual, is_run=folder.exists(ORIGIN_FILE))
    for name, about in declared(*_classes(kind)).items():
        if about.code and name not in flags:
            for reference in about.checked(files.values.get(name)):
                user_code.check_trusted(split_call(reference)[0], flag(name), files.place_of(name), folders)
    reference = files.values.get("workload") or loading.DEFAULT
    return loading.load_again(reference, flags.get("workload"), files.place_of("workload"), folders)


def _read_flags(kind: str, workload_class: type[Workload], given: Given | None) -> Given:
    """Return the flags, or the settings that a call has ``given``, after checking their names."""
    classes, recipes = _classes(kind, workload_class.Settings), workload_class.recipes
    if given is None:
        defaults, choices = recipes.get("default", {}), {"recipe": recipes or ["default"]}
        first = _MOST_USED if kind == "train" else (*_OF_TUNING, *_MOST_USED)
        about = _DESCRIPTIONS[kind].format(command=command(kind))
        return Parser(about, *classes, defaults=defaults, choices=choices, first=first).read_flags()
    settings.check_known(given, {*declared(*classes)} - ONLY_FLAGS, "the call")
    return given


def _check_saved(saved: Mapping[str, Given], classes: Sequence[type]) -> None:
    """Raise UsageError, with the file's name, if a run's setting is unknown or wrong."""
    for file, values in saved.items():
        known = {name for name, about in declared(*classes).items() if about.on_resume == "saved"}
        settings.check_known(values, known, file)
    layers.check_files(saved, classes)


def _build_job(
    kind: str, run: RunFolder, workload_class: type[Workload], ordered: Layers, *, is_resumed: bool, is_call: bool
) -> Job:
    """Return the job that the settings describe. Raises UsageError."""
    asked, given = ordered.values, frozenset(ordered.places[FLAGS])
    train, workers = _in_steps(settings.build(TrainConfig, asked), ordered), settings.build(WorkerConfig, asked)
    output = dataclasses.replace(settings.build(OutputConfig, asked), run_name=run.name, storage_path=run.storage_path)
    _check_together(train, workers)
    _find_code(output)
    code = _find_code(train)
    calls: dict[str, Any] = {name: tuple(source.call for source in found) for name, found in code.items()}
    train = dataclasses.replace(train, **calls, init_from=_initial(train, run, given, is_resumed=is_resumed))
    folders = runs.untrusted_folders(run, run.storage_path)
    untrusted = {
        name: tuple(source.call for source in found)
        for name, found in {"workload": (workload_class.source,), **code}.items()
        if any(user_code.why_untrusted(source.reference, folders) for source in found)
    }
    return Job(
        workload=workload_class(settings.build(workload_class.Settings, asked)),
        train=train,
        workers=workers,
        output=output,
        run=run,
        resume_with=resume_command(kind, output, untrusted, is_call=is_call),
        callbacks=code.get("callback", ()),
        initial=None if train.init_from is None else run,
        layers=ordered,
        is_resumed=is_resumed,
    )


def _find_code(config: Any) -> dict[str, tuple[SourceCode, ...]]:
    """Load the user's classes that a config names; return their sources by setting. Raises UsageError."""
    found = {}
    for name, about in declared(type(config)).items():
        if about.code and (calls := getattr(config, name)):
            base = pkgutil.resolve_name(about.code)
            found[name] = tuple(user_code.find_with_arguments(call, base) for call in calls)
    return found


def _initial(train: TrainConfig, run: RunFolder, given: frozenset[str], *, is_resumed: bool) -> str | None:
    """Return where the initial weights are, as a path valid in any working folder. Raises UsageError."""
    if train.init_from is None or (is_resumed and "init_from" not in given):  # it is resolved already
        return train.init_from
    place = find_run(train.init_from, run.storage_path)
    if not is_resumed and not place.exists():  # a resumed run has its own copy of the weights
        raise UsageError(f"--init-from {train.init_from}: there is no such run, checkpoint or file")
    return masked(place.uri)


def _in_steps(train: TrainConfig, ordered: Layers) -> TrainConfig:
    """Return the settings, with the epochs that --num-steps makes, if it is set. Raises UsageError."""
    if train.num_steps is None:
        if train.validate_every is not None:
            raise UsageError("--validate-every needs --num-steps; without it, validation follows each pass")
        return train
    places = [*ordered.places]
    of_epochs, of_steps = ordered.place_of("num_epochs"), ordered.place_of("num_steps")
    if of_epochs == of_steps == FLAGS:
        raise UsageError(f"--num-steps {train.num_steps} replaces --num-epochs; leave one of them out")
    if of_epochs and places.index(of_epochs) > places.index(of_steps):
        where = "" if of_epochs == FLAGS else f" of {of_epochs}"
        found = f"--num-steps {train.num_steps} replaces --num-epochs{where}"
        raise UsageError(f"{found}; leave that out, or add --num-steps none")
    every = min(train.validate_every or math.ceil(train.num_steps / 10), train.num_steps)
    return dataclasses.replace(train, validate_every=every, num_epochs=math.ceil(train.num_steps / every))


def resume_command(kind: str, output: OutputConfig, more: Given | None = None, *, is_call: bool = False) -> str:
    """Return the command or Python call that resumes a run of ``kind``, with ``more`` settings and without secrets."""
    about = declared(OutputConfig)
    again = {name: getattr(output, name) for name in about if about[name].on_resume == "given"}
    several = {name: [value] if isinstance(value, str) else value for name, value in {**again, **(more or {})}.items()}
    values = [(name, [*map(masked, given)]) for name, given in several.items() if given]
    if is_call:
        words = [f"{name}={given[0] if len(given) == 1 else given!r}" for name, given in values]
        return f"{kind}(resume=True, {', '.join(words)})"
    words = [word for name, given in values for value in given for word in (flag(name), value)]
    return f"{command(kind)} {shlex.join(['--resume', *words])}"


def _check_used(kind: str, job: Job) -> None:
    """Raise UsageError if a given setting has no effect, or this version of Ray lacks it."""
    for name in sorted(job.given & _OF_RAY) if job.workers.num_workers == 0 else ():
        raise UsageError(f"{shown(name)} has no effect with --num-workers 0, which trains without Ray; leave it out")
    if job.output.json and job.output.dry_run:
        raise UsageError("--json prints a result, but --dry-run has none; leave it out")
    if job.train.strategy == "fsdp" and job.workload.has_unused_parameters:
        remedy = "call every expert, also on no rows, and leave has_unused_parameters out"
        raise UsageError(f"--strategy fsdp needs all parameters in each step: {remedy}")
    check_workers(job.workers)
    if kind == "train" and "num_chunks" in job.given and not job.train.reproducible:
        raise UsageError("--set num_chunks has no effect without --reproducible; leave it out")
    if kind == "train" and type(job.workload).create_optimizer is Workload.create_optimizer:
        for name in sorted(job.given & job.train.unused):
            raise UsageError(f"{shown(name)} has no effect: {job.train.optimizer} does not use it; leave it out")


def _check_together(train: TrainConfig, workers: WorkerConfig) -> None:
    """Raise UsageError if settings cannot be combined."""
    if train.seed + train.num_seeds > 2**31:
        raise UsageError(f"--num-seeds {train.num_seeds}: the last seed would be above {2**31 - 1:,}; lower --seed")
    if train.fold is not None and train.fold > (train.folds or 0):
        raise UsageError(f"fold {train.fold} needs at least as many --folds")
    if train.fold is not None and train.num_seeds > 1:
        raise UsageError("--set fold: each seed of --num-seeds divides the folds anew; leave one of the two out")
    if train.folds is not None and train.overfit_batches is not None:
        raise UsageError("--overfit-batches tests on the training examples; leave --folds out")
    if train.lr_schedule == "one-cycle" and train.warmup_steps:
        raise UsageError("warmup_steps: one-cycle has its own warm-up; choose another --lr-schedule")
    if train.strategy == "fsdp" and train.compile:
        raise UsageError("--strategy fsdp does not work with --compile, which cannot trace how units are gathered")
    if train.activation_checkpointing and train.compile:
        raise UsageError("--set activation_checkpointing does not work with --compile, which cannot trace it")
    if train.reproducible_chunks is None:
        return
    number = workers.num_workers or 1
    share = f"--reproducible: {number} workers cannot share {count(train.reproducible_chunks, 'chunk')} of a batch"
    conflicts = {
        f"{share}; lower --num-workers, or start a run with more num_chunks": number > train.reproducible_chunks,
        "--reproducible computes on CPUs only; leave --use-gpu out": workers.use_gpu == "yes",
        "--reproducible adds up whole gradients in a fixed order; use --strategy ddp": train.strategy == "fsdp",
        "--reproducible computes one chunk at a time; use --set num_chunks, not --micro-batch-size": (
            train.micro_batch_size is not None
        ),
        "--reproducible does not work with --compile, whose kernels may give different bits": train.compile,
    }
    for conflict, is_there in conflicts.items():
        if is_there:
            raise UsageError(conflict)


def _check_unchanged(kind: str, job: Job, saved: Mapping[str, Given], ordered: Layers) -> None:
    """Raise UsageError if a resumed run's settings have changed, except those that do not affect the weights."""
    ((file, then),) = saved.items()
    named = {name for place, values in ordered.places.items() if place != file for name in values}
    for config_class in (*_DECIDING[kind], type(job.workload.settings)):
        before: Any = settings.build(config_class, then)
        after: Any = settings.build(config_class, {**job.asked, **job.values})
        for name, about in declared(config_class).items():
            old, new = getattr(before, name), getattr(after, name)
            if name in named and about.decides_weights and old != new and not _has_moved(about, old, new):
                then_and_now = [" ".join(value) or "none" if about.code else value for value in (old, new)]
                found = f"--resume: run {job.run.name} was started with {shown(name)} {then_and_now[0]}"
                where = "" if name in ordered.places[FLAGS] else f" as in {ordered.place_of(name)}"
                raise UsageError(f"{found}, not {then_and_now[1]}{where}; leave that out, or start another run")


def _has_moved(about: Setting, old: Any, new: Any) -> bool:
    """Return whether two values name one file or folder that has moved; for data, digests are compared, too."""
    if about.code:
        return len(old) == len(new) and all(map(_is_same_code, old, new))
    are_places = isinstance(old, (str, Path)) and isinstance(new, (str, Path))
    if not are_places or Path(old).name != Path(new).name:
        return False
    return os.path.exists(new) and (about.decides_data or not os.path.exists(old))


def _is_same_code(old: str, new: str) -> bool:
    """Return whether two references differ only in the folder."""
    (then, arguments), (now, new_arguments) = split_call(old), split_call(new)
    return arguments == new_arguments and Path(then).name == Path(now).name


def _with_origin(job: Job) -> Job:
    """Return a resumed job with its origin, and with notes for the user."""
    run, source, notes = job.run, job.workload.source, [*job.notes]
    origin = run.read_json(ORIGIN_FILE) or {}
    if not (run.exists(MEMBERS_FILE) or run.checkpoint_names()):
        notes.append(f"run {run.name} has no checkpoint yet; starting from the beginning")
    if origin.get("workload_sha256") not in (None, source.sha256):
        notes.append(f"the workload has changed since the run was started: {source.reference}")
    return dataclasses.replace(job, origin=origin, notes=tuple(notes))
