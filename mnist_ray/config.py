"""Every setting of the jobs that does not belong to a workload.

Standard library only, so that a wrong flag is answered before anything heavy is imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from mnist_ray.settings import Choice, Range, at_least, fraction, positive, setting, within

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def _png() -> dict[str, Any]:
    return {"check": lambda path: path is None or path.lower().endswith(".png"), "must": "must end in .png"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Hyperparameters of one training run: with the workload's own, all that decides which weights come out."""

    num_epochs: int = setting(2, "passes over the training set", **at_least(1))
    batch_size: int = setting(
        128, "examples per optimizer step, over all workers", search=Choice((32, 64, 128, 256, 512)), **at_least(1)
    )
    learning_rate: float = setting(
        5e-3,
        "peak of the schedule, at this batch size; never scaled by the number of workers",
        search=Range(5e-4, 2e-2, log=True),
        **positive(),
    )
    schedule: Literal["one-cycle", "constant"] = setting("one-cycle", "how the learning rate moves over the run")
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "what makes steps of the gradients")
    beta1: float = setting(0.9, "Adam's decay of the gradient's mean", **fraction(with_one=False))
    beta2: float = setting(0.999, "Adam's decay of the gradient's square", **fraction(with_one=False))
    momentum: float = setting(0.9, "momentum of SGD", **fraction(with_one=False))
    weight_decay: float = setting(0.0, "how much a step pulls the weights to zero; AdamW is made for it", **at_least(0))
    label_smoothing: float = setting(
        0.0, "of a classification's training: how much of each target is spread over all classes", **fraction()
    )
    ema_decay: float | None = setting(
        None,
        "keep and evaluate an exponential moving average (EMA) of the weights with this decay, e.g. 0.99",
        **fraction(with_one=False),
    )
    early_stop: int | None = setting(None, "stop after so many epochs without a better validation", **at_least(1))
    precision: Precision = setting(
        "auto",
        "arithmetic of the forward and backward pass; auto: bf16 where the hardware has it; fp16: with a scaled loss",
    )
    validation_size: int | None = setting(
        None,
        "training examples held out for validation; 0: train on all, keep the last checkpoint; default: a tenth, at "
        "most 5,000, or the data's own validation set",
        **at_least(0),
    )
    seed: int = setting(0, "decides the initial weights and the order of the examples", **within(0, 2**31 - 1))
    clip_grad_norm: float | None = setting(
        None, "largest norm of a step's gradients; larger ones are scaled down", **positive()
    )
    micro_batch_size: int | None = setting(
        None,
        "examples that a worker computes at a time, if its share of a batch does not fit into memory",
        **at_least(1),
    )
    compile: bool = setting(False, "compile the model by torch.compile, which takes a C++ compiler and a minute")
    callback: str | None = setting(None, "your code in the training loop: FILE.py or package.module, or its :NAME")
    limit: float = setting(
        1.0,
        "fraction of all data to use, drawn at random: to try things out",
        check=lambda part: 0 < part <= 1,
        must="must be above 0, and at most 1",
    )
    overfit_batches: int | None = setting(
        None, "train and test on the examples of so many batches only: a model that works learns them", **at_least(1)
    )
    checkpoint_every: int = setting(1000, "steps between checkpoints within an epoch", **at_least(1))
    reproducible: bool = setting(
        False, "the same weights to the last bit on any number of workers, one thread each, on CPUs; slower"
    )
    num_chunks: int = setting(
        8, "parts of a batch whose gradients --reproducible adds up in a fixed order; the most workers", **at_least(1)
    )

    @property
    def chunks(self) -> int | None:
        """The parts of a batch whose gradients are added up in a fixed order; None where each rank has one slice."""
        return self.num_chunks if self.reproducible else None

    def num_steps(self, num_examples: int) -> int:
        """Return the optimizer steps of an epoch; the last batch may be smaller."""
        return math.ceil(num_examples / self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How the training is spread over a machine or a cluster."""

    num_workers: int | None = setting(
        None,
        "training processes; default: one per GPU, else one per node with all its cores; 0: this process, without Ray",
        **at_least(0),
    )
    cpus_per_worker: int | None = setting(
        None,
        "CPUs of one worker, and its threads, while each has 8 examples; default: the cluster's CPUs shared evenly",
        **at_least(1),
    )
    use_gpu: Literal["auto", "yes", "no"] = setting("auto", "auto: where the cluster has any")
    loader_workers: int = setting(
        0, "processes of each worker that read a Dataset; 0: the worker itself; arrays need none", **at_least(0)
    )
    min_workers: int | None = setting(None, "go on with as few as this while the cluster holds no more", **at_least(1))
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK", "workers on few nodes or on many; STRICT: on one, or each on another, else not at all"
    )
    autoscaling: bool = setting(False, "the cluster starts nodes on demand: wait for those that are not there yet")
    max_failures: int = setting(3, "how often lost workers are replaced before the run fails", **at_least(0))
    fork_workers: Literal["auto", "no"] = setting(
        "auto", "worker processes by fork, which start in tenths of a second; auto: where it is known to be safe"
    )
    hang_timeout_s: float = setting(
        600.0,
        "seconds without a step after which a worker is taken for hung and replaced",
        **within(1, 10**6),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where results go and how much is said."""

    storage_path: str = setting("~/ray_results", "folder or URI (s3://…) for all runs; every node must see it")
    run_name: str | None = setting(
        None,
        "folder of this run under --storage-path; default: the date, the time and a random number",
        check=lambda name: name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
        must="must be letters, digits, '.', '_' or '-'",
    )
    resume: bool = setting(False, "go on with --run-name from its last checkpoint")
    tracker: str | None = setting(None, "your code that follows the run: FILE.py or package.module, or its :NAME")
    profile: int | None = setting(
        None,
        "steps of the first worker to profile: a trace for Perfetto, and the most expensive operators",
        **at_least(1),
    )
    detect_anomaly: bool = setting(False, "stop at the first operation that produces a NaN gradient; slow")
    dashboard: bool = setting(False, "start Ray's dashboard for a local run, which goes with it")
    check: bool = setting(False, "train nothing: say how the job would run, and whether every node could take part")
    quiet: bool = setting(False, "print only the result")
    verbose: bool = setting(False, "print Ray's own log as well")


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupConfig:
    """Where runs are found."""

    storage_path: str = setting("~/ray_results", "where a run given by its name, or else the newest, is looked for")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Which examples are shown."""

    split: Literal["train", "test"] = setting("train", "the part of the data set")
    index: int = setting(0, "the first example, counted from 0; with --label among those that have it", **at_least(0))
    count: int = setting(1, "examples, from --index on; several are drawn as a grid", **within(1, 1000))
    label: str | None = setting(None, "show only examples with this label")
    output: str = setting("view.png", "the picture's file", **_png())
    stats: bool = setting(
        False, "print what the parts of the data hold: examples per class, means, standard deviations; draw nothing"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionConfig:
    """How predictions for pictures are printed."""

    threshold: float = setting(0.8, "least probability of a prediction that is not called unsure", **fraction())
    as_is: bool = setting(False, "scale the picture and no more: for a model of other images than the workload's own")
    json: bool = setting(False, "print a JSON object a line, for programs")
    grid: str | None = setting(None, "file to draw what the network saw into, with its predictions", **_png())


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What is written."""

    format: Literal["torch", "onnx"] = setting("torch", "torch: a program of torch.export; onnx: for ONNX runtimes")
    output: str | None = setting(None, "the file; default: model.pt2 or model.onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a checkpoint is evaluated."""

    num_tasks: int = setting(1, "Ray tasks that share the examples; the result is the same for any", **at_least(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """How a sweep searches."""

    sweep: tuple[str, ...] | None = setting(
        None,
        "what is searched, each as NAME=A,B,C, NAME=LOW:HIGH or NAME=log:LOW:HIGH; default: every setting with "
        "a search space that has no flag here",
    )
    num_trials: int = setting(16, "configurations to try", **at_least(1))
    search: Literal["random", "optuna", "grid"] = setting("random", "how configurations are proposed")
    scheduler: Literal["asha", "none"] = setting("asha", "asha stops trials early that fall behind")
    num_confirmed: int = setting(
        3,
        "best configurations trained with two more seeds each before one is chosen; 0: one seed decides",
        **at_least(0),
    )
    max_concurrent_trials: int | None = setting(
        None, "trials at a time; default, and most without --autoscaling: what the cluster holds", **at_least(1)
    )
    time_budget_s: float | None = setting(None, "seconds after which no trial goes on", **positive())
