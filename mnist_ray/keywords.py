"""The settings of ``train`` and ``tune`` as keyword arguments, for type checkers. Written by a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from mnist_ray.config import Precision
from mnist_ray.report.run_files import Run

# Files or modules with classes, such as ``freeze.py:Freeze(num_epochs=2)``.
UserCode = str | Path | Sequence[str | Path] | None


class TrainKeywords(TypedDict, total=False):
    """The settings, by name. What is not given keeps its default."""

    num_epochs: int
    num_steps: int | None
    validate_every: int | None
    batch_size: int
    learning_rate: float
    lr_schedule: str
    lr_scales: str
    warmup_steps: int
    optimizer: str
    beta1: float
    beta2: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    ema_decay: float | None
    early_stopping_patience: int | None
    precision: Precision
    validation_size: int | None
    init_from: Run | str | Path | None
    seed: int
    num_seeds: int
    folds: int | None
    fold: int | None
    clip_grad_norm: float | None
    micro_batch_size: int | None
    strategy: Literal["ddp", "fsdp"]
    compile: bool
    callback: UserCode
    limit: float
    no_test: bool
    overfit_batches: int | None
    checkpoint_every: int | None
    keep_checkpoints: int | None
    reproducible: bool
    num_chunks: int
    num_streams: int
    num_workers: int | None
    cpus_per_worker: int | None
    use_gpu: Literal["auto", "yes", "no"] | bool
    loader_workers: int
    read_ahead_mib: int
    min_workers: int | None
    autoscaling: bool
    max_failures: int
    fork_workers: Literal["auto", "no"]
    plain_ray: bool
    hang_timeout_s: float
    run_name: str | None
    storage_path: str | Path
    resume: Literal["no", "yes", "auto"] | bool
    tracker: UserCode
    dry_run: bool
    quiet: bool
    verbose: bool
    recipe: str | None
    config: str | Path | Sequence[str | Path]


class TuneKeywords(TrainKeywords, total=False):
    """The settings, by name. What is not given keeps its default."""

    sweep: Sequence[str] | Mapping[str, Any] | None
    num_trials: int
    search_algorithm: Literal["random", "grid"]
    scheduler: Literal["halving", "none"]
    num_confirmed: int
    max_concurrent_trials: int | None
