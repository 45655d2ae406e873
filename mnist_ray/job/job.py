"""A job's settings and its folder. Imports neither torch nor Ray, to report wrong settings at once."""

from __future__ import annotations

import dataclasses
import math
import os
import pkgutil
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_ray import layers, runs, settings, storage
from mnist_ray.config import OutputConfig, SourceConfig, SweepConfig, TrainConfig, WorkerConfig, shown
from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser, peek
from mnist_ray.job import rules
from mnist_ray.job.lease import remove_dead_owner
from mnist_ray.layers import FLAGS, ONLY_FLAGS, Place, Placed
from mnist_ray.runs import find_run, is_sweep
from mnist_ray.schema import CONFIG_FILE, MEMBERS_FILE, ORIGIN_FILE, REPORT_FILE, RESULT_FILE
from mnist_ray.settings import Given, Setting, declared, flag, split_call
from mnist_ray.storage import RunFolder
from mnist_ray.text import PROGRAM, command, masked
from mnist_ray.workload import loading, user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import SourceCode

_AGAIN = ("run_name", "storage_path", "tracker")  # not saved with a run: whoever resumes it gives them again
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
_DAILY = (
    *("sweep", "num_trials", "workload", "config", "num_epochs", "batch_size", "learning_rate", "num_workers"),
    *("use_gpu", "run_name", "storage_path", "resume", "dry_run", "callback", "tracker"),
)


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
    placed: Mapping[str, Placed] = dataclasses.field(default_factory=dict)  # all that a place gives, also a sweep's
    is_resumed: bool = False
    is_finished: bool = False  # with --resume auto
    origin: Given = dataclasses.field(default_factory=dict)  # a resumed run's origin.json
    notes: tuple[str, ...] = ()  # printed before the job starts

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that a place gives."""
        return layers.values_in(self.placed)

    @property
    def given(self) -> frozenset[str]:
        """The names of the settings that this command or call gives."""
        return frozenset(name for name, found in self.placed.items() if found.place == FLAGS)

    @property
    def unused(self) -> set[str]:
        """The settings that the optimizer does not use; none are known of a workload's own optimizer."""
        if type(self.workload).create_optimizer is not Workload.create_optimizer:
            return set()
        used = {"adam": {"beta1", "beta2"}, "adamw": {"beta1", "beta2"}, "sgd": {"momentum"}}
        return {"beta1", "beta2", "momentum"} - used.get(self.train.optimizer, set())

    @property
    def by_place(self) -> dict[str, dict[str, Any]]:
        """The settings of the run that a place gives, by place, the weakest first."""
        of_command = declared(OutputConfig, SourceConfig).keys() - {"workload", *_AGAIN}
        ordered = sorted(self.placed.items(), key=lambda pair: pair[1].rank)
        found = dict[str, dict[str, Any]]()
        for name, (value, place, _) in ordered:
            if name not in of_command:
                found.setdefault(place, {})[name] = value
        return found

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
        job = dataclasses.replace(self, workload=changed, train=settings.build(TrainConfig, all_values))
        rules.check(job)
        return job


def read_job(given: Given | None = None, kind: str = "train") -> Job:
    """Read the settings of ``train`` or ``tune`` from ``given``, or from the command line if it is None.

    Choose the run, check that its code is trusted, order the places, build the job. Later places win: recipes, the
    project, the environment, a resumed run's own settings, the files of --config, flags. Raises UsageError, JobError.
    """
    early = peek(*classes_of_job(kind)) if given is None else given  # without the workload's own settings
    defaults, notes = layers.defaults()
    files = layers.read_files(early.get("config"))
    of_output = layers.merged([*defaults, *files, Place(FLAGS, early)], OutputConfig)
    run, saved = _choose_run(kind, settings.build(OutputConfig, layers.values_in(of_output)))
    workload_class = load_trusted(run, early, [*defaults, *saved, *files], files)
    classes = classes_of_job(kind, workload_class.Settings)
    flags = _read_flags(kind, workload_class, given)
    if "workload" in flags:  # in a call, it may be a class
        flags = {**flags, "workload": workload_class.source.reference}
    layers.check_names([*defaults, *files], workload_class.Settings)
    for place in saved:
        of_run = declared(*_DECIDING[kind], WorkerConfig, workload_class.Settings)
        settings.check_known(place.values, {"workload", *of_run}, place.name)
    places = layers.in_order(workload_class.recipes, defaults, saved, [*files, Place(FLAGS, flags)])
    placed = layers.merged(places, *classes)
    job = _build_job(kind, run, workload_class, placed, is_resumed=bool(saved), is_call=given is not None)
    rules.check(job)
    if kind == "train":  # of a sweep, each trial is checked
        rules.check_used([job], job.given)
    job = dataclasses.replace(job, notes=tuple(notes))
    if not saved:
        check_free(run, resume=job.output.resume)  # after all mistakes, and --help
        return job
    _check_unchanged(kind, job, saved[0])
    if job.output.resume == "auto" and run.read_json(RESULT_FILE) is not None:
        return dataclasses.replace(job, is_finished=True)
    return _with_origin(job)


def classes_of_job(kind: str, *of_workload: type) -> list[type]:
    """Return the classes of the settings of ``train`` or ``tune``."""
    return [SourceConfig, *_DECIDING[kind], *of_workload, WorkerConfig, OutputConfig]


def _choose_run(kind: str, output: OutputConfig) -> tuple[RunFolder, list[Place]]:
    """Return a job's folder, and a resumed run's settings as a place; none for a new run. Raises like read_job."""
    if output.resume != "no" and output.run_name is None:
        raise UsageError("--resume needs --run-name NAME")
    run = storage.locate(output.storage_path, output.run_name or storage.new_name(kind))
    if output.resume == "no":
        return run, []
    with storage.in_one_line(f"cannot read {run.uri}"):
        saved = run.read_json(CONFIG_FILE)
    if (saved is None and output.resume == "yes") or (saved is not None and is_sweep(saved) != (kind == "tune")):
        raise UsageError(f"--resume: there is no run of {kind} in {run.uri}; check --run-name and --storage-path")
    if saved is None:
        return run, []
    check_free(run, resume=output.resume, is_resumed=True)
    return run, [Place(run.inside(CONFIG_FILE).uri, saved)]


def check_free(run: RunFolder, *, resume: str, is_resumed: bool = False) -> None:
    """Raise UsageError if a new run already exists, or a resumed run is finished; with ``auto``, it may be."""
    if is_resumed:
        is_finished = run.read_json(RESULT_FILE) is not None
        if is_finished:
            remove_dead_owner(run)
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


def load_trusted(run: RunFolder, flags: Given, places: Sequence[Place], files: Iterable[Place]) -> type[Workload]:
    """Return the workload. Raises UsageError if only a place other than the flags names code that is not trusted.

    ``files``: those of --config. Code is not trusted if it may have come with a run.
    """
    folders = runs.untrusted_folders(run, run.storage_path)
    for file in files:
        # The file may name another storage, but that does not make the code in the usual one trusted.
        usual, home = layers.storage_path(flags.get("storage_path")), Path(file.name).expanduser().absolute().parent
        folder = storage.locate(str(home.parent), home.name)
        is_of_run = file.folder is None or folder.exists(CONFIG_FILE) or folder.exists(ORIGIN_FILE)
        folders += runs.untrusted_folders(folder if is_of_run else run, usual, is_run=folder.exists(ORIGIN_FILE))
    classes = (TrainConfig, OutputConfig, SourceConfig)
    placed = layers.merged(places, *classes)
    for name, (value, place, _) in placed.items():
        if declared(*classes)[name].code and name not in flags:
            for reference in value:
                user_code.check_trusted(split_call(reference)[0], flag(name), place, folders)
    reference, place, _ = placed.get("workload", (None, "", 0))
    return loading.load_again(reference or loading.DEFAULT, flags.get("workload"), place, folders)


def _read_flags(kind: str, workload_class: type[Workload], given: Given | None) -> Given:
    """Return the flags, or the settings that a call has ``given``, after checking their names."""
    classes, recipes = classes_of_job(kind, workload_class.Settings), workload_class.recipes
    if given is None:
        about = f"{_DESCRIPTIONS[kind].format(command=command(kind))}\n\nRecipes: {', '.join(recipes) or 'none'}"
        return Parser(about, *classes, defaults=recipes.get("default", {}), daily=_DAILY).read_flags()
    settings.check_known(given, {*declared(*classes)} - ONLY_FLAGS, "the call")
    return given


def _build_job(
    kind: str,
    run: RunFolder,
    workload_class: type[Workload],
    placed: Mapping[str, Placed],
    *,
    is_resumed: bool,
    is_call: bool,
) -> Job:
    """Return the job that the settings describe. Raises UsageError."""
    asked = layers.values_in(placed)
    output = dataclasses.replace(settings.build(OutputConfig, asked), run_name=run.name, storage_path=run.storage_path)
    train = settings.build(TrainConfig, asked)
    _find_code(output)
    code = _find_code(train)
    calls: dict[str, Any] = {name: tuple(source.call for source in found) for name, found in code.items()}
    is_new_start = not is_resumed or ("init_from" in placed and placed["init_from"].place == FLAGS)
    initial = _initial(train, run, is_resumed=is_resumed) if is_new_start else train.init_from
    folders = runs.untrusted_folders(run, run.storage_path)
    untrusted = {
        name: tuple(source.call for source in found)
        for name, found in {"workload": (workload_class.source,), **code}.items()
        if any(user_code.why_untrusted(source.reference, folders) for source in found)
    }
    return Job(
        workload=workload_class(settings.build(workload_class.Settings, asked)),
        train=_in_epochs(dataclasses.replace(train, **calls, init_from=initial)),
        workers=settings.build(WorkerConfig, asked),
        output=output,
        run=run,
        resume_with=resume_command(kind, output, untrusted, is_call=is_call),
        callbacks=code.get("callback", ()),
        initial=None if initial is None else run,
        placed=placed,
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


def _initial(train: TrainConfig, run: RunFolder, *, is_resumed: bool) -> str | None:
    """Return where the initial weights are, as a path valid in any working folder. Raises UsageError."""
    if train.init_from is None:
        return None
    place = find_run(train.init_from, run.storage_path)
    if not is_resumed and not place.exists():  # a resumed run has its own copy of the weights
        raise UsageError(f"--init-from {train.init_from}: there is no such run, checkpoint or file")
    return masked(place.uri)


def _in_epochs(train: TrainConfig) -> TrainConfig:
    """Return the settings, with the epochs that --num-steps makes, if it is set."""
    if train.num_steps is None:
        return train
    every = min(train.validate_every or math.ceil(train.num_steps / 10), train.num_steps)
    return dataclasses.replace(train, validate_every=every, num_epochs=math.ceil(train.num_steps / every))


def resume_command(kind: str, output: OutputConfig, more: Given | None = None, *, is_call: bool = False) -> str:
    """Return the command or Python call that resumes a run of ``kind``, with ``more`` settings and without secrets."""
    again = {name: getattr(output, name) for name in _AGAIN}
    several = {name: [value] if isinstance(value, str) else value for name, value in {**again, **(more or {})}.items()}
    values = [(name, [*map(masked, given)]) for name, given in several.items() if given]
    if is_call:
        words = [f"{name}={given[0] if len(given) == 1 else given!r}" for name, given in values]
        return f"{kind}(resume=True, {', '.join(words)})"
    words = [word for name, given in values for value in given for word in (flag(name), value)]
    return f"{command(kind)} {shlex.join(['--resume', *words])}"


def resume_command_of(run: RunFolder, config: Given) -> str:
    """Return the command that resumes a run with the content of its config.json."""
    output = OutputConfig(run_name=run.name, storage_path=run.storage_path)
    return resume_command("tune" if is_sweep(config) else "train", output)


def _check_unchanged(kind: str, job: Job, saved: Place) -> None:
    """Raise UsageError if a resumed run's settings have changed, except those that do not affect the weights."""
    classes = (*_DECIDING[kind], type(job.workload.settings))
    then = layers.merged([saved], *classes)
    for name, about in declared(*classes).items():
        if name not in job.placed or job.placed[name].place == saved.name or not about.decides_weights:
            continue
        value, place, _ = job.placed[name]
        old = then[name].value if name in then else about.default
        new = about.checked(job.values.get(name, value))
        if old != new and not _has_moved(about, old, new):
            then_and_now = [" ".join(each) or "none" if about.code else each for each in (old, new)]
            found = f"--resume: run {job.run.name} was started with {shown(name)} {then_and_now[0]}"
            where = "" if place == FLAGS else f" as in {place}"
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
