"""What is settled before Ray: a job's settings, its folder and its data.

Nothing here imports torch or Ray, so that a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_ray import settings
from mnist_ray.cluster import ray_internals
from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError, count, did_you_mean
from mnist_ray.flags import UNSET, Parser, peek
from mnist_ray.settings import flag
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    RESULT_FILE,
    TRIALS_FILE,
    RunFolder,
    locate,
    untrusted_folders,
)
from mnist_ray.trackers.tracker import Tracker
from mnist_ray.training.callback import Callback
from mnist_ray.workload import source, user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.user_code import Source

Given = Mapping[str, Any]
"""Settings by their names, beside ``workload``, ``recipe`` and ``config``: what a command line says, too."""


@dataclass(frozen=True)
class Job:
    """All settings of a training run."""

    workload: Workload
    train: TrainConfig
    workers: WorkerConfig
    output: OutputConfig
    run: RunFolder
    resume_with: str  # the command that goes on with it, as one would type it; or the call, where it was called
    notes: tuple[str, ...] = ()  # what the user is to know before it begins
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a run that goes on, what it has kept of how it began."""
    callback: Source | None = None  # the user's code in the training loop
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # all settings, those of a sweep among them
    given: Collection[str] = ()  # the settings that this command or call names, and not a recipe or a file

    @property
    def values(self) -> dict[str, Any]:
        """All that config.json holds."""
        assert self.workload.source is not None
        own = settings.values_of(self.train, self.workload.settings, self.workers)
        return {"workload": self.workload.source.reference, **own}

    def with_values(self, values: Mapping[str, Any]) -> Job:
        """Return it with other values of the training's and the workload's settings."""
        workload, all_values = self.workload, {**self.values, **values}
        changed = type(workload)(settings.build(workload.Settings, all_values), workload.metadata)
        return dataclasses.replace(self, workload=changed, train=settings.build(TrainConfig, all_values))


def read_job(
    given: Given | None = None,
    kind: str = "train",
    description: str = "Train a workload on Ray, evaluate it on the test set, and write the run's files.",
    config_file: str = CONFIG_FILE,
    more_settings: Sequence[type] = (),
) -> Job:
    """Read the command line of a job that trains, or what is ``given`` in its place. Raises UsageError.

    ``kind`` is ``train`` or ``tune``. There are flags for ``more_settings`` and those of a training run; the run keeps
    all of them in ``config_file``. Later layers win: recipe, config file, saved run, flags.
    """
    peeked = peek("workload", "config", "resume", "run_name", "storage_path") if given is None else given
    from_file = settings.read_config_file(peeked["config"]) if "config" in peeked else {}
    run, saved = _find_run(peeked, kind, config_file)
    files = {run.inside(config_file).uri: saved, **({peeked["config"]: from_file} if "config" in peeked else {})}
    untrusted = _untrusted_folders(peeked, run)
    workload_class = _load_workload(files, peeked.get("workload"), untrusted)

    kept = (*more_settings, TrainConfig, workload_class.Settings, WorkerConfig)
    classes, recipes = (*kept, OutputConfig), workload_class.recipes
    flags = _read_flags(description, classes, recipes) if given is None else checked(given, classes, recipes)
    _check_files(files, kept, peeked, flags, untrusted)
    recipe = {**recipes.get("default", {}), **recipes.get(flags.get("recipe", "default"), {})}
    named = {name: value for name, value in flags.items() if name not in ("recipe", "config")}
    asked = merged(recipe if not saved or "recipe" in flags else {}, from_file, named)
    _check_output(settings.build(OutputConfig, asked))
    if not saved:
        check_free(run, resume=False)
        return _job_of(kind, workload_class, asked, run, flags, is_call=given is not None)
    values = merged(saved, asked)
    _check_unchanged(run, kept, saved, values)
    job = _job_of(kind, workload_class, values, run, flags, is_call=given is not None)
    origin, notes = _left_by(run, kind)
    return dataclasses.replace(job, origin=origin, notes=(*notes, *_changes_since(origin, workload_class)))


def _job_of(
    kind: str,
    workload_class: type[Workload],
    values: Mapping[str, Any],
    run: RunFolder,
    flags: Mapping[str, Any],
    *,
    is_call: bool,
) -> Job:
    """Return the job that some settings ask for. Raises UsageError."""
    train, workers = settings.build(TrainConfig, values), settings.build(WorkerConfig, values)
    output = settings.build(OutputConfig, values)
    _check_reproducible(train, workers)
    assert workload_class.source is not None
    code, callback = {"workload": workload_class.source.reference}, None
    if train.callback is not None:
        _, callback = user_code.find(train.callback, Callback)
        train = dataclasses.replace(train, callback=callback.reference)
        code["callback"] = callback.reference
    folders = untrusted_folders(run, run.storage_path)
    to_name = {name: place for name, place in code.items() if user_code.why_untrusted(place, folders)}
    resume_with = (run.resume_call if is_call else run.resume_command)(kind, output.mlflow, to_name)
    workload = workload_class(settings.build(workload_class.Settings, values))
    return Job(
        workload, train, workers, output, run, resume_with, callback=callback, asked=values, given=frozenset(flags)
    )


def _untrusted_folders(peeked: Mapping[str, Any], run: RunFolder) -> list[Path]:
    """Return where code may have come with a run: see ``untrusted_folders``."""
    if "config" not in peeked:
        return untrusted_folders(run, run.storage_path)
    folder = settings.path_of(peeked["config"], "--config").absolute().parent
    beside = untrusted_folders(locate(str(folder.parent), folder.name), run.storage_path)
    return [*untrusted_folders(run, run.storage_path), *beside]


def _load_workload(
    files: Mapping[str, Mapping[str, Any]], reference: str | None, untrusted: Iterable[Path]
) -> type[Workload]:
    """Return the workload that is named by ``reference``, else by the last of some files that names one."""
    naming = [(values["workload"], file) for file, values in files.items() if "workload" in values]
    held, file = naming[-1] if naming else (source.DEFAULT, "")
    return source.load_again(held, reference, file, untrusted)


def _check_files(
    files: Mapping[str, Mapping[str, Any]],
    config_classes: Sequence[type],
    peeked: Mapping[str, Any],
    flags: Mapping[str, Any],
    untrusted: Iterable[Path],
) -> None:
    """Raise UsageError if files have settings that are unknown or wrong, or name code that may have come with them."""
    for file, values in files.items():
        of_another = "workload" in peeked and values.get("workload", peeked["workload"]) != peeked["workload"]
        named = f"{file}, of the workload {values['workload']}," if of_another else file
        settings.check_known(values, settings.names_of(config_classes) | {"workload"}, named)
        try:
            for config_class in config_classes:
                settings.build(config_class, values)
        except UsageError as error:
            raise UsageError(f"{named}: {error}") from error
        if values.get("callback") is not None and "callback" not in flags:
            user_code.check_trusted(values["callback"], Callback, file, untrusted)


def _read_flags(
    description: str, config_classes: Sequence[type], recipes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    parser = Parser(description, *config_classes, defaults=recipes.get("default", {}))
    parser.add_argument(
        "--workload",
        metavar="FILE.py",
        default=UNSET,
        help="what is learned: FILE.py or package.module, with :NAME where it holds several; default: MNIST",
    )
    parser.add_argument(
        "--recipe", choices=recipes or ["default"], default=UNSET, help="named settings; flags override"
    )
    parser.add_argument("--config", metavar="FILE", default=UNSET, help="settings from a run's config.json")
    return parser.read_flags()


def checked(given: Given, config_classes: Sequence[type], recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given in place of a command line. Raises UsageError where that cannot be."""
    known = settings.names_of(config_classes) | {"workload", "recipe", "config"}
    for name in given:
        if name not in known:
            raise UsageError(f"there is no setting {name}{did_you_mean(name, known)}")
    if given.get("recipe", "default") not in (*recipes, "default"):
        raise UsageError(f"there is no recipe {given['recipe']}; there is {', '.join(recipes) or 'none'}")
    for config_class in config_classes:
        settings.build(config_class, given)
    return dict(given)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of which those of a later layer take the place of earlier ones."""
    return {name: value for layer in layers for name, value in layer.items()}


def _find_run(peeked: Mapping[str, Any], kind: str, config_file: str) -> tuple[RunFolder, dict[str, Any]]:
    """Return a job's folder, and what a run that goes on was started with. Raises UsageError."""
    default = OutputConfig()
    name = peeked.get("run_name")
    if peeked.get("resume") and name is None:
        raise UsageError("--resume needs --run-name NAME")
    run = locate(peeked.get("storage_path", default.storage_path), name or _new_name(kind))
    if not peeked.get("resume"):
        return run, {}
    if not run.exists(config_file):
        raise UsageError(f"--resume: there is no run to go on with in {run.uri}: no {config_file}")
    check_free(run, resume=True)
    return run, run.require_json(config_file)


def _left_by(run: RunFolder, kind: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return what a run that goes on has kept of how it began, and what the user is to know of its files."""
    notes: list[str] = []
    origin = run.read_json(ORIGIN_FILE, notes.append)
    for file_name in (RESULT_FILE, ray_internals.SNAPSHOT_FILE):
        run.read_json(file_name, notes.append)
    if not (run.exists(TRIALS_FILE) if kind == "tune" else run.checkpoint_names()):
        notes.append(f"run {run.name} has saved nothing: it begins anew")
    return origin or {}, tuple(notes)


def check_free(run: RunFolder, *, resume: bool) -> None:
    """Raise UsageError where a run is there already, or is finished where it is to be resumed."""
    if resume and run.read_json(RESULT_FILE) is not None:
        raise UsageError(f"--resume: run {run.name} is finished; its result is in {run.inside(RESULT_FILE).uri}")
    if not resume and run.exists():
        raise UsageError(f"run {run.uri} exists already; add --resume to go on with it, or give another --run-name")


def _new_name(kind: str) -> str:
    """Return a run's name when none is given: two jobs that begin in the same second have different ones."""
    return f"{kind}_{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}"


def _check_reproducible(train: TrainConfig, workers: WorkerConfig) -> None:
    if train.chunks is None:
        return
    if (workers.num_workers or 1) > train.chunks:
        raise UsageError(
            f"--reproducible: {workers.num_workers} workers cannot share {count(train.chunks, 'chunk')} of a batch; "
            "lower --num-workers, or start a run with more --num-chunks"
        )
    if workers.use_gpu == "yes":
        raise UsageError("--reproducible computes on CPUs only; leave --use-gpu out")
    if train.micro_batch_size is not None:
        raise UsageError("--reproducible computes a chunk at a time; take more --num-chunks, not --micro-batch-size")
    if train.compile:
        raise UsageError("--reproducible does not go with --compile, whose kernels' bits are not known to be the same")


def _check_output(output: OutputConfig) -> None:
    if output.dashboard and importlib.util.find_spec("aiohttp_cors") is None:
        raise UsageError("--dashboard needs more of Ray: pip install 'ray[default]'")
    if output.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UsageError("--mlflow needs MLflow: pip install -e '.[mlflow]'")
    if output.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs Weights & Biases: pip install wandb")
    if output.tracker is not None:
        user_code.find(output.tracker, Tracker)


def _check_unchanged(
    run: RunFolder, config_classes: Sequence[type], then: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise UsageError where a run would go on with other settings than it was started with.

    Those of the workers are free to change: the batches do not depend on them.
    """
    for config_class in config_classes:
        if config_class is WorkerConfig:
            continue
        before, after = (settings.values_of(settings.build(config_class, values)) for values in (then, now))
        for name, old in before.items():
            if (new := after[name]) != old:
                raise UsageError(
                    f"--resume: run {run.name} was started with {flag(name)} {old}, not {new}; "
                    "leave the flag out, or start another run"
                )


def _changes_since(origin: Mapping[str, Any], workload_class: type[Workload]) -> tuple[str, ...]:
    """Say where a run's workload has other code than when the run began."""
    assert workload_class.source is not None
    if origin.get("workload_sha256") in (None, workload_class.source.sha256):
        return ()
    return (f"the workload has changed since the run began: {workload_class.source.reference}",)


def about(job: Job) -> dict[str, Any]:
    """Return what a job's checkpoints say of where they come from."""
    return {"config": dataclasses.asdict(job.train), "workload": job.workload.identity}
