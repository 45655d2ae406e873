"""Every setting of the jobs: one typed field each, shared by the flag, the file and the code.

Standard library only, so that a wrong flag is answered before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_ray.errors import UsageError

T = TypeVar("T")
Check = Callable[[Any], bool]
Precision = Literal["auto", "fp32", "bf16"]


def setting(default: T, help: str, check: Check | None = None, must: str = "") -> T:  # noqa: A002
    """Declare a field: its default, its help text (unit and scope), and what its value must fulfil."""
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "must": must})


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _positive() -> tuple[Check, str]:
    return _is_positive, "must be a positive number"


def _png() -> tuple[Check, str]:
    return lambda path: path is None or path.lower().endswith(".png"), "must end in .png"


def _at_least(minimum: int) -> dict[str, Any]:
    return {"check": lambda value: value is None or value >= minimum, "must": f"must be at least {minimum}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Hyperparameters of one training run: with the data, all that decides which weights come out."""

    num_epochs: int = setting(2, "passes over the training images", **_at_least(1))
    batch_size: int = setting(128, "images per optimizer step, over all workers", **_at_least(1))
    learning_rate: float = setting(
        5e-3,
        "peak of the schedule, at this batch size; never scaled by the number of workers",
        *_positive(),
    )
    schedule: Literal["one-cycle", "constant"] = setting("one-cycle", "how the learning rate moves over the run")
    beta1: float = setting(0.7, "Adam's decay of the gradient's mean", lambda b: 0 <= b < 1, "must be in [0, 1)")
    beta2: float = setting(0.9, "Adam's decay of the gradient's square", lambda b: 0 <= b < 1, "must be in [0, 1)")
    precision: Precision = setting(
        "auto", "arithmetic of the forward and backward pass; auto: bf16 on CPUs that have it in hardware"
    )
    validation_size: int = setting(
        5000, "training images held out for validation; 0: train on all, keep the last checkpoint", **_at_least(0)
    )
    seed: int = setting(
        0,
        "decides the initial weights and the order of the images",
        lambda seed: 0 <= seed < 2**31,
        "must be at least 0, and below 2,147,483,648",
    )
    checkpoint_every: int = setting(1000, "steps between checkpoints within an epoch", **_at_least(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images to learn from."""

    dataset: Literal["mnist", "fashion-mnist", "kmnist"] = setting(
        "mnist", "mnist ships with the package; the others are downloaded once by torchvision"
    )
    data_dir: str | None = setting(None, "a folder with four IDX files in MNIST's format, in place of --dataset")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How the training is spread over a machine or a cluster."""

    num_workers: int | None = setting(
        None, "training processes; default: one per GPU, else one per node with all its cores", **_at_least(1)
    )
    cpus_per_worker: int | None = setting(
        None,
        "CPUs of one worker, and its threads, while each has 8 images; default: the cluster's CPUs shared evenly",
        **_at_least(1),
    )
    use_gpu: Literal["auto", "yes", "no"] = setting("auto", "auto: where the cluster has any")
    min_workers: int | None = setting(
        None, "go on with as few as this while the cluster holds no more; also as --num-workers MIN:MAX", **_at_least(1)
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK", "workers on few nodes or on many; STRICT: on one, or each on another, else not at all"
    )
    autoscaling: bool = setting(False, "the cluster starts nodes on demand: wait for those that are not there yet")
    max_failures: int = setting(3, "how often lost workers are replaced before the run fails", **_at_least(0))
    hang_timeout_s: float = setting(
        600.0,
        "seconds without a step after which a worker is taken for hung and replaced",
        lambda seconds: 0 < seconds <= 1e6,
        "must be positive, and at most a million",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where results go and how much is said."""

    storage_path: str = setting("~/ray_results", "folder or URI (s3://…) for all runs; every node must see it")
    run_name: str | None = setting(
        None,
        "folder of this run under --storage-path; default: the date, the time and a random number",
        lambda name: name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
        "must be letters, digits, '.', '_' or '-'",
    )
    resume: bool = setting(False, "go on with --run-name from its last checkpoint")
    mlflow: str | None = setting(None, "URI of an MLflow server or store to track the run in, as sqlite:///mlflow.db")
    check: bool = setting(False, "train nothing: say how the job would run, and whether every node could take part")
    quiet: bool = setting(False, "print only the result")
    verbose: bool = setting(False, "print Ray's own log as well")


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupConfig:
    """Where runs are found."""

    storage_path: str = setting("~/ray_results", "where a run given by its name, or else the newest, is looked for")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Which images are shown."""

    split: Literal["train", "test"] = setting("train", "the part of the data set")
    index: int = setting(0, "the first image, counted from 0; with --label among those that have it", **_at_least(0))
    count: int = setting(
        1, "images, from --index on; several are drawn as a grid", lambda n: 1 <= n <= 1000, "must be 1 to 1000"
    )
    label: int | None = setting(None, "show only images with this label", **_at_least(0))
    output: str = setting("view.png", "the picture's file", *_png())
    stats: bool = setting(
        False, "print the number of images per class and the pixels' mean and standard deviation, and draw nothing"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionConfig:
    """How images are answered."""

    threshold: float = setting(
        0.8, "least probability of an answer that is not called unsure", lambda p: 0 <= p <= 1, "must be in [0, 1]"
    )
    as_is: bool = setting(False, "scale to grey 28×28 and no more: for a model of other images than digits")
    json: bool = setting(False, "print a JSON object a line, for programs")
    grid: str | None = setting(None, "file of a picture to draw of what the network saw, with its answers", *_png())


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What is written."""

    format: Literal["torch", "onnx"] = setting("torch", "torch: a program of torch.export; onnx: for ONNX runtimes")
    output: str | None = setting(None, "the file; default: model.pt2 or model.onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a checkpoint is evaluated."""

    num_tasks: int = setting(1, "Ray tasks that share the images; the result is the same for any", **_at_least(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What a sweep searches, and how."""

    num_trials: int = setting(16, "configurations to try", **_at_least(1))
    search: Literal["random", "optuna", "grid"] = setting("random", "how configurations are proposed")
    scheduler: Literal["asha", "none"] = setting("asha", "asha stops trials early that fall behind")
    batch_sizes: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512),
        "batch sizes to choose from",
        lambda sizes: len(sizes) > 0 and all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes),
        "must be different numbers from 1 on",
    )
    learning_rate_min: float = setting(5e-4, "smallest learning rate", *_positive())
    learning_rate_max: float = setting(2e-2, "largest learning rate", *_positive())
    num_confirmed: int = setting(
        3,
        "best configurations trained with two more seeds each before one is chosen; 0: one seed decides",
        **_at_least(0),
    )
    max_concurrent_trials: int | None = setting(
        None, "trials at a time; default, and most without --autoscaling: what the cluster holds", **_at_least(1)
    )
    time_budget_s: float | None = setting(
        None, "seconds after which no trial goes on", lambda s: s is None or s > 0, "must be positive"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """All settings of a training job."""

    train: TrainConfig
    data: DataConfig
    workers: WorkerConfig
    output: OutputConfig


RUN_SETTINGS = (TrainConfig, DataConfig, WorkerConfig)
"""What a config file holds; where the results go is not part of it."""
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "notebook": {
        "num_epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "beta1": 0.9,
        "beta2": 0.999,
        "precision": "fp32",
        "validation_size": 0,
    },
}
"""Named values of TrainConfig; a flag or a --config file overrides them."""


def value_type(annotation: Any) -> tuple[type[Any], tuple[str, ...] | None]:
    """Return a setting's plain type, and its choices where it is a ``Literal``; of a tuple, ``tuple``."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    return get_origin(annotation) or annotation, None


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from those of ``values`` that it has, checking each against its type and its rule.

    Raises UsageError for a value of the wrong type or outside its range.
    """
    hints = get_type_hints(config_class)
    chosen = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if field.name in values:
            chosen[field.name] = _checked(field, hints[field.name], values[field.name], flag(field.name))
    return config_class(**chosen)


def _checked(field: dataclasses.Field[Any], annotation: Any, value: Any, shown: str) -> Any:
    plain, choices = value_type(annotation)
    if value is None and type(None) in get_args(annotation):
        return None
    if plain is float and type(value) is int:
        value = float(value)
    if plain is tuple and type(value) is list:
        value = tuple(value)
    is_of_type = type(value) is plain and (plain is not tuple or all(type(item) is int for item in value))
    if not is_of_type:
        raise UsageError(f"{shown} must be of type {plain.__name__}, not {value!r}")
    if choices and value not in choices:
        raise UsageError(f"{shown} must be one of {', '.join(choices)}, not {value!r}")
    check: Check | None = field.metadata["check"]
    if check and not check(value):
        raise UsageError(f"{shown} {field.metadata['must']}, not {value!r}")
    return value


def read_config_file(path: str, config_classes: tuple[type, ...]) -> dict[str, Any]:
    """Read settings from a JSON object; raise UsageError where it is not one or names an unknown setting."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {path}: {_reason(error)}") from error
    return parse_config(text, path, config_classes)


def parse_config(text: str, source: str, config_classes: tuple[type, ...]) -> dict[str, Any]:
    """Parse the JSON text of a config file; ``source`` names it in errors. Raises UsageError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold a JSON object with one setting a line")
    known = {field.name for config_class in config_classes for field in dataclasses.fields(config_class)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UsageError(f"{source} has unknown settings: {', '.join(unknown)}")
    return values


def flag(name: str) -> str:
    """Return the flag of a setting: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def values_of(*configs: Any) -> dict[str, Any]:
    """Return the settings of some configs as flat values, as a config file holds them."""
    return {name: value for config in configs for name, value in dataclasses.asdict(config).items()}


def build_job(values: Mapping[str, Any]) -> JobConfig:
    """Build all settings of a job from flat values. Raises UsageError."""
    return JobConfig(
        train=build(TrainConfig, values),
        data=build(DataConfig, values),
        workers=build(WorkerConfig, values),
        output=build(OutputConfig, values),
    )


def chosen_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the user chose: a recipe's values, overridden by a config file's, overridden by flags."""
    values = dict(RECIPES[flags.get("recipe", "default")])
    if "config" in flags:
        values |= read_config_file(flags["config"], RUN_SETTINGS)
        if "dataset" in flags:  # takes the place of a saved folder, which would come before it
            values.pop("data_dir", None)
    values |= {name: value for name, value in flags.items() if name not in ("recipe", "config")}
    if isinstance(values.get("data_dir"), str):  # it is saved with the run, and read again from wherever one is then
        values["data_dir"] = str(Path(values["data_dir"]).expanduser().absolute())
    return values


def to_json(job: JobConfig) -> str:
    """Return the settings as a config file, which ``--config`` takes back."""
    return json_lines(values_of(job.train, job.data, job.workers))


def json_lines(values: Mapping[str, Any]) -> str:
    """Return a JSON object with one key a line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"


def check_fits(config: TrainConfig, num_train: int) -> None:
    """Check a config against the number of training images in the data; raise UsageError where it does not fit."""
    if config.validation_size >= num_train:
        raise UsageError(
            f"--validation-size {config.validation_size:,} leaves nothing to train on: "
            f"the data has {num_train:,} training images"
        )
    left = num_train - config.validation_size
    if config.batch_size > left:
        raise UsageError(f"--batch-size {config.batch_size:,} is larger than the {left:,} images to train on")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
