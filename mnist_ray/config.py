"""All settings of the jobs, except a workload's own. Imports nothing heavy, so wrong flags are reported at once."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mnist_ray.errors import UsageError, first_line
from mnist_ray.settings import (
    Choice,
    Range,
    at_least,
    declared,
    flag,
    fraction,
    positive,
    rule,
    setting,
    split_call,
    within,
)
from mnist_ray.text import did_you_mean

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_PLAIN = "use only Ray's public API; starts more slowly; try it if Ray misbehaves"
_JSON = "print the result as one JSON object on stdout, and all else on stderr"
_RUN = "a run's name, or the folder or URI of a run or a checkpoint; default: the newest run"
READ_AHEAD_MIB = 512  # of each worker
OPTIMIZERS = {"adam": "torch.optim.Adam", "adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
SCHEDULES = ("constant", "one-cycle", "cosine", "linear")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_RARE: Any = {"has_flag": False}  # a settings file, a keyword or --set NAME=VALUE sets it
_SHARED: Any = {"is_searchable": False}  # by all trials of a sweep
_FREE: Any = {"decides_weights": False}  # a resumed run may have another value
_FILE: Any = {"metavar": "FILE.py", "paths": r"\.py($|[:(])"}


def _ending(suffix: str) -> dict[str, Any]:
    return rule(lambda path: path.lower().endswith(suffix), f"must end in {suffix}") | {"metavar": f"FILE{suffix}"}


def _code(description: str, base: str, **more: Any) -> Any:
    description += ": FILE.py[:NAME][(KEY=VALUE, …)] or package.module…; may be repeated"
    return setting((), description, code=base, is_repeated=True, **_FILE, **more)


def of_torch(text: str, module_name: str) -> tuple[Any, dict[str, Any]]:
    """Return the class that a text such as ``torch.optim.RAdam(eps=1e-6)`` names, and its arguments.

    Only classes of the module are found: a settings file cannot name other code. Raises UsageError.
    """
    name, arguments = split_call(text)
    module, own_name = importlib.import_module(module_name), name.removeprefix(f"{module_name}.")
    found = getattr(module, own_name, None)
    if not isinstance(found, type) or name == own_name:
        raise UsageError(f"{module_name} has no class {own_name}{did_you_mean(own_name, dir(module))}")
    try:
        inspect.signature(found).bind_partial(None, **arguments)
    except TypeError as error:
        raise UsageError(f"{text}: {first_line(error)}") from error
    return found, arguments


def _named(names: Sequence[str], module_name: str, example: str) -> dict[str, Any]:
    """Allow some names, and classes of a module of PyTorch."""

    def is_known(text: str) -> bool:
        return text in names or ("." in text and bool(of_torch(text, module_name)))

    of_rule = rule(is_known, f"must be {', '.join(names)} or a class such as {example}")
    return of_rule | {"metavar": "{" + ",".join(names) + "}"}


def lr_scales_in(text: str) -> dict[str, float]:
    """Return the factors in ``backbone.*=0.1 head.*=2``, by pattern. Raises ValueError."""
    return {pattern: float(factor) for pattern, _, factor in (part.rpartition("=") for part in text.split())}


def _has_scales(text: str) -> bool:
    try:
        return all(pattern and 0 <= factor < math.inf for pattern, factor in lr_scales_in(text).items())
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the settings come from."""

    workload: str | None = setting(None, "FILE.py or package.module[:NAME]; default: MNIST", **_FILE)
    recipe: str | None = setting(None, "a named set of settings; flags override them")
    config: tuple[str, ...] = setting((), "a TOML, YAML or JSON file; the last wins", metavar="FILE", is_repeated=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Hyperparameters of one training run: all but a few affect the weights, as do the workload's settings."""

    num_epochs: int = setting(3, "passes over the training set", **_SHARED, **at_least(1))
    num_steps: int | None = setting(None, "optimizer steps, instead of --num-epochs", **_SHARED, **at_least(1))
    validate_every: int | None = setting(
        None,
        "steps between validations; default: those of an epoch or, with --num-steps, a tenth of these",
        **_SHARED,
        **at_least(1),
    )
    batch_size: int = setting(
        32, "examples per optimizer step, across all workers", search=Choice((16, 32, 64, 128, 256)), **at_least(1)
    )
    learning_rate: float = setting(
        1e-3, "peak of the schedule; not scaled by the worker count", search=Range(1e-4, 1e-2, log=True), **positive()
    )
    lr_schedule: str = setting(
        "constant",
        "learning-rate schedule, or torch.optim.lr_scheduler.NAME(KEY=VALUE, …)",
        **_named(SCHEDULES, "torch.optim.lr_scheduler", "torch.optim.lr_scheduler.StepLR(step_size=100)"),
    )
    lr_scales: str = setting(
        "",
        "factors of the learning rate by parameters' names: PATTERN=FACTOR …",
        **_RARE,
        **rule(_has_scales, "must be PATTERN=FACTOR, such as backbone.*=0.1, separated by spaces"),
    )
    warmup_steps: int = setting(0, "steps in which the learning rate rises; not for one-cycle", **_RARE, **at_least(0))
    optimizer: str = setting(
        "adam",
        "optimizer, or torch.optim.NAME(KEY=VALUE, …); adamw differs from adam only with --weight-decay",
        **_named([*OPTIMIZERS], "torch.optim", "torch.optim.RAdam(eps=1e-6)"),
    )
    beta1: float = setting(0.9, "decay of Adam's mean of the gradients", **_RARE, **fraction(with_one=False))
    beta2: float = setting(0.999, "decay of Adam's mean of the squared gradients", **_RARE, **fraction(with_one=False))
    momentum: float = setting(0.9, "momentum of SGD", **_RARE, **fraction(with_one=False))
    weight_decay: float = setting(0.0, "weight decay: an L2 penalty; with adamw, decoupled", **within(0, 1000))
    label_smoothing: float = setting(0.0, "part of each class target to spread over all", **_RARE, **fraction())
    ema_decay: float | None = setting(None, "decay of the weights' EMA, which is evaluated", **fraction(with_one=False))
    early_stopping_patience: int | None = setting(None, "validations without improvement before a stop", **at_least(1))
    precision: Precision = setting("auto", "number format of both passes; auto: bf16 if supported and fast, else fp32")
    validation_size: int | None = setting(
        None, "examples to hold out; 0: none; default: the data's own, or a tenth up to 5,000", **_SHARED, **at_least(0)
    )
    init_from: str | None = setting(None, "a run, checkpoint, .safetensors or .pt file to start from", **_SHARED)
    seed: int = setting(0, "determines initial weights and order of the examples", **_SHARED, **within(0, 2**31 - 1))
    num_seeds: int = setting(1, "runs, with seeds from --seed on; reports their mean", **_SHARED, **within(1, 10_000))
    folds: int | None = setting(None, "cross-validation: runs, each tested on one part", **_SHARED, **within(2, 10_000))
    fold: int | None = setting(None, "only the run of this fold, from 1 on", **_SHARED, **_RARE, **at_least(1))
    clip_grad_norm: float | None = setting(None, "maximum norm of gradients; larger ones are scaled down", **positive())
    micro_batch_size: int | None = setting(None, "examples per forward pass; gradients are accumulated", **at_least(1))
    strategy: Literal["ddp", "fsdp"] = setting("ddp", "fsdp: each worker holds a part of the training state", **_FREE)
    compile: bool = setting(False, "compile the model with torch.compile; needs a C++ compiler and takes a minute")
    callback: tuple[str, ...] = _code("your Callback", "mnist_ray.training.callback:Callback", **_SHARED)
    limit: float = setting(
        1.0, "fraction of all data, at random", **_SHARED, **rule(lambda part: 0 < part <= 1, "must be in (0, 1]")
    )
    no_test: bool = setting(False, "leave the test set alone: results are those of the validation set", **_SHARED)
    overfit_batches: int | None = setting(None, "train and test only on this many batches", **_SHARED, **at_least(1))
    checkpoint_every: int | None = setting(
        None,
        "steps between checkpoints within an epoch; auto: one each minute",
        unset="auto",
        **_FREE,
        **at_least(1),
    )
    keep_checkpoints: int | None = setting(
        2, "best checkpoints to keep; the last one is kept, too; or all", unset="all", **_RARE, **_FREE, **at_least(1)
    )
    reproducible: bool = setting(False, "the same bits on any number of workers; slower: CPUs only, one thread each")
    num_chunks: int = setting(
        8, "with --reproducible: chunks per batch, and the maximum number of workers", **_RARE, **within(1, 1024)
    )
    num_streams: int = setting(
        8, "with data in blocks: streams of an epoch, and the maximum number of workers", **_RARE, **within(1, 1024)
    )

    @property
    def is_several(self) -> bool:
        """Whether these are the settings of several runs: one per seed and fold."""
        return self.num_seeds > 1 or self.is_folded

    @property
    def is_folded(self) -> bool:
        """Whether these are the settings of a whole cross-validation."""
        return self.folds is not None and self.fold is None

    @property
    def reproducible_chunks(self) -> int | None:
        """The number of chunks per batch with --reproducible; else None, as each rank has a slice."""
        return self.num_chunks if self.reproducible else None

    def steps_per_pass(self, num_examples: int) -> int:
        """Return the number of steps in one pass over the examples; the last batch may be smaller."""
        return math.ceil(num_examples / self.batch_size)

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the number of steps per epoch: those of a pass or, with --num-steps, --validate-every."""
        if self.num_steps is not None and self.validate_every is not None:
            return self.validate_every
        return self.steps_per_pass(num_examples)

    def total_steps(self, num_examples: int) -> int:
        """Return the number of steps of the whole training."""
        return self.num_steps or self.num_epochs * self.steps_per_pass(num_examples)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """Workers on a machine or a cluster."""

    num_workers: int | None = setting(
        None, "training processes; 0: this one, without Ray; default: one per GPU, else one per node", **at_least(0)
    )
    cpus_per_worker: int | None = setting(None, "CPUs per worker; default: all, shared evenly", **at_least(1))
    use_gpu: Literal["auto", "yes", "no"] = setting("auto", "train on GPUs; auto: if PyTorch finds any")
    loader_workers: int = setting(0, "processes per worker to read a Dataset; 0: none; not for arrays", **at_least(0))
    read_ahead_mib: int = setting(READ_AHEAD_MIB, "MiB per worker for reading ahead in blocks", **_RARE, **at_least(1))
    min_workers: int | None = setting(None, "fewest workers to go on with if not all have room", **_RARE, **at_least(1))
    autoscaling: bool = setting(False, "wait for nodes that the cluster starts on demand")
    max_failures: int = setting(3, "how many times to replace lost workers before the run fails", **at_least(0))
    fork_workers: Literal["auto", "no"] = setting("auto", "fork workers to start faster; auto: if it is safe", **_RARE)
    plain_ray: bool = setting(False, _PLAIN)
    hang_timeout_s: float = setting(
        600.0, "seconds without progress after which a worker is replaced", **_RARE, **within(1, 10**6)
    )

    @property
    def of_many(self) -> WorkerConfig:
        """The workers of one of many runs; by default one with one core, as parallel runs gain more than threads."""
        number = 1 if self.num_workers is None else self.num_workers
        return replace(self, num_workers=number, cpus_per_worker=self.cpus_per_worker or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Results and messages."""

    run_name: str | None = setting(
        None,
        "folder of this run under --storage-path; default: date, time and a random number",
        **rule(lambda name: _NAME.fullmatch(name), "must be at most 200 letters, digits, '.', '_' or '-'"),
    )
    storage_path: str = setting("~/ray_results", "folder or URI (s3://…) of all runs, seen by every node", paths=".")
    resume: Literal["no", "yes", "auto"] = setting(
        "no", "continue the run of --run-name; auto: or start it, or print its result", bare="yes"
    )
    tracker: tuple[str, ...] = _code("wandb, mlflow or your Tracker, beside TensorBoard", "mnist_ray.trackers:Tracker")
    dry_run: bool = setting(False, "train nothing; print the plan and whether every node is ready for it")
    json: bool = setting(False, _JSON)
    quiet: bool = setting(False, "print only the result")
    verbose: bool = setting(False, "also print Ray's own log")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Storage."""

    storage_path: str | None = setting(None, "folder or URI; default: the project's, or ~/ray_results", metavar="PLACE")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(StorageConfig):
    """Trained model."""

    run: str | None = setting(None, _RUN, metavar="RUN")
    workload: str | None = setting(None, "FILE.py or package.module; default: the run's", metavar="FILE.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(ModelConfig):
    """Run."""

    run: str | None = setting(None, _RUN, word="RUN")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangesConfig:
    """Settings of the workload."""

    set: tuple[str, ...] = setting((), "another value for a workload's setting", metavar="NAME=VALUE", is_repeated=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonConfig:
    """Result."""

    json: bool = setting(False, _JSON)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Choice of examples."""

    workload: str | None = setting(None, "FILE.py or package.module; default: project's or MNIST", metavar="FILE.py")
    config: tuple[str, ...] = setting((), "settings in TOML, YAML or JSON", metavar="FILE", is_repeated=True)
    split: Literal["train", "test"] = setting("train", "part of the data")
    index: int = setting(0, "first example, from 0", **at_least(0))
    count: int = setting(1, "number of examples; several are drawn as a grid", **within(1, 1000))
    output: str = setting("view.png", "image file to write", **_ending(".png"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionConfig:
    """Output of predictions."""

    files: tuple[str, ...] = setting((), "images or folders; texts for a language model", word="IMAGE_OR_FOLDER")
    threshold: float = setting(0.8, "predictions below this probability are marked unsure", **fraction())


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Data at scale, on Ray."""

    input: str | None = setting(None, "folder, URI or pattern of pictures, texts or Parquet files", metavar="PLACE")
    output: str | None = setting(None, "folder or URI of predictions; the same command continues them", metavar="PLACE")
    column: tuple[str, ...] = setting(
        (), "columns of a table that hold the input; default: the workload's, or the only one", metavar="NAME"
    )
    num_actors: int | None = setting(None, "processes; default: one per GPU or, without any, per CPU", **at_least(1))
    use_gpu: Literal["auto", "yes", "no"] = setting("auto", "GPUs for the actors; auto: if the cluster has free ones")
    plain_ray: bool = setting(False, _PLAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsConfig(StorageConfig):
    """List of runs."""

    count: int = setting(20, "number of runs", **within(1, 10**6))
    where: tuple[str, ...] = setting(
        (), "only runs with this value of a setting", metavar="NAME=VALUE", is_repeated=True
    )
    sort: str | None = setting(
        None,
        "a metric, best first; NAME:min or NAME:max says what is best; default: the newest first",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Exported file."""

    format: Literal["pt2", "onnx", "safetensors"] | None = setting(
        None, "a program of torch.export, one for ONNX, or the weights; default: by the ending of --output, or pt2"
    )
    output: str | None = setting(None, "file to write; default: model.FORMAT", metavar="FILE")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonConfig(StorageConfig):
    """Runs to compare."""

    first: str = setting("", "A: a run's name, folder or URI", word="RUN")
    second: str = setting("", "B: the run to compare with it", word="RUN")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectConfig:
    """New project."""

    name: str = setting("", "the folder to make; the workload has its name in CamelCase", word="NAME")
    kind: Literal["images", "table", "text", "blank"] = setting("blank", "sample data; blank: arrays made in the code")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on Ray."""

    num_tasks: int | None = setting(
        None, "Ray tasks for the test; default: one per GPU, else one per node", **at_least(1)
    )
    use_gpu: Literal["auto", "yes", "no"] = setting("auto", "a GPU for each task; auto: if the cluster has a free one")
    plain_ray: bool = setting(False, _PLAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Hyperparameter search."""

    sweep: tuple[str, ...] | None = setting(
        None, "settings to search: NAME=A,B, NAME=LOW:HIGH or NAME=log:LOW:HIGH; default: all with a search space"
    )
    num_trials: int = setting(16, "configurations to try, including the default one", **within(1, 10_000))
    search_algorithm: Literal["random", "grid"] = setting("random", "how configurations are chosen")
    scheduler: Literal["halving", "none"] = setting(
        "halving", "which trials stop early; halving: the worse half after 1/8, 1/4 and 1/2 of the epochs"
    )
    num_confirmed: int = setting(3, "best configurations that get two more seeds; 0: one seed decides", **at_least(0))
    max_concurrent_trials: int | None = setting(None, "trials at a time; default: all that fit", **_FREE, **at_least(1))


CLASSES: tuple[type, ...] = (SourceConfig, TrainConfig, WorkerConfig, OutputConfig, SweepConfig)
"""All settings of ``train`` and ``tune``: those that settings files and Python's keywords may have."""


def shown(name: str) -> str:
    """Return what messages call a setting of training or of a workload: its flag, or ``--set NAME``."""
    about = declared(*CLASSES).get(name)
    return about.shown if about else flag(name)
