"""The files of a run, their keys and their columns: what is checked when they are read, and what the reference says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FILE, ORIGIN_FILE, RESULT_FILE, REPORT_FILE = "config.json", "origin.json", "result.json", "report.html"
METRICS_FILE, STEPS_FILE, COLUMNS_FILE = "metrics.csv", "steps.csv", "predictions.parquet"
MEMBERS_FILE, MEMBERS_FOLDER = "members.csv", "members"  # of a job of many runs
BEST_FILE = "best.json"  # of a sweep
INITIAL_FILE = "initial.safetensors"  # the weights that a run starts from, with --init-from
STATE_FILE = "state.json"  # of a checkpoint

CHECKPOINT_NAME = re.compile(r"checkpoint_epoch-(\d{1,18})_step-(\d{1,18})", re.ASCII)
_MEMBER = re.compile(rf"{MEMBERS_FOLDER}/(?!\.\.?$)[^/\0]{{1,255}}", re.ASCII)
_RESULT_CHECKPOINT = re.compile(rf"({MEMBERS_FOLDER}/(?!\.\.?/)[^/\0]{{1,255}}/)?{CHECKPOINT_NAME.pattern}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A file, a key of a JSON file, or a column. Capitals in its name stand for another word."""

    meaning: str  # Markdown for the reference; links start in docs/reference
    is_right: Callable[[Any], bool] = lambda value: True  # of a key's value; ... if the key is missing
    flaw: str = ""  # what a damaged file's error says
    is_optional: bool = False  # whether some runs have none


def _is_text_or_missing(value: Any) -> bool:
    return value is ... or isinstance(value, str)


def _are_members_or_missing(value: Any) -> bool:
    """Return whether all are folders of this job: a run of somebody else may name any."""
    return value is ... or (isinstance(value, list) and all(_MEMBER.fullmatch(str(path)) for path in value))


_JOB = Entry("of the job")
_LOSS = Entry("the loss on the test set, and each metric, such as `test_accuracy`; `null` for NaN")
_CLASSES = Entry("only of a `Classification`; a row of the matrix is a label", is_optional=True)
_TRAINING = Entry("mean over the examples of the epoch, or since the previous row")
_VALIDATION = Entry("on the validation set")
_RATE = Entry("examples per second in training, over all workers")
_NORM = Entry("with `--clip-grad-norm`: the largest of a step, before clipping", is_optional=True)
_TIME = Entry(
    "[where the time went](../guides/debugging.md#slow) since the previous row: mean seconds of a worker; `workers_s`"
    " is the wait for other workers, `start_s` the first step"
)
_TIMES = ("data", "copies", "compute", "workers", "optimizer", "callbacks", "checkpoints", "storage", "validation")

KEYS: Mapping[str, Mapping[str, Entry]] = {
    CONFIG_FILE: {
        "workload": Entry("the workload's file or module", _is_text_or_missing, "its workload is not a text")
    },
    RESULT_FILE: {
        "format_version": Entry("2"),
        "evaluated": Entry("`test`, or `val` without a test set: then, names begin with `val_` instead of `test_`"),
        "test_loss": _LOSS,
        "test_METRIC": _LOSS,
        "num_test_examples": Entry("the size of the test set"),
        "notes": Entry("how many of its examples have NaN in their loss, and which is the first"),
        "accuracy_per_class": _CLASSES,
        "confusion_matrix": _CLASSES,
        "members": Entry(
            "of a job of many runs: the folders of those that were tested. Figures are means over these; all else is"
            " the kept run's, or after a cross-validation that of all folds",
            _are_members_or_missing,
            "its members are not runs of this job",
            is_optional=True,
        ),
        "spread": Entry(
            "of several tested runs: by figure, their `values` and the 95 % `interval` of the mean", is_optional=True
        ),
        "formats": Entry(
            "how to show each figure, by its name: `fraction` (from 0 to 1, shown as a percentage), `number`, or a"
            " [format of Python](https://docs.python.org/3/library/string.html#format-specification-mini-language)"
            " such as `,.0f`. With it, programs need not load the workload"
        ),
        "seconds": Entry(
            "of each phase, and `total`; of a resumed run, since its last start",
            lambda seconds: isinstance(seconds, dict),
            "its seconds are missing",
        ),
        "checkpoint": Entry(
            "the name of the tested checkpoint",
            lambda path: bool(_RESULT_CHECKPOINT.fullmatch(str(path))),
            "its checkpoint is not one of this run",
        ),
        "checkpoint_metrics": Entry("its [metrics](#a-checkpoint)"),
        "weights_sha256": Entry("the digest of its weights"),
        "examples_per_s": _RATE,
        "is_resumed": Entry("whether the run was resumed"),
        "num_workers": Entry("the number of workers at the end"),
        "workers": Entry("their devices, threads, precision and hosts"),
        "command_line": _JOB,
        "git_commit": _JOB,
        "versions": _JOB,
    },
    ORIGIN_FILE: {
        "command_line": _JOB,
        "git_commit": _JOB,
        "versions": _JOB,
        "started": _JOB,
        "workload_sha256": Entry("the digest of the workload's file"),
        "workload_code": Entry("the lines of that file"),
        "metadata": Entry("the metadata of the data"),
        "data_name": Entry("the data's name"),
        "data": Entry(
            "a digest of each part: a run is [resumed](../understand/failures.md#resuming) only with the same data"
        ),
        "unused_settings": Entry("settings that do not affect this run, which the report leaves out"),
        "parameters": Entry("the number of the model's parameters"),
        "workers": Entry("the number of workers, and their devices"),
        "precision": Entry("of the training"),
        "repository": Entry(
            "of the git repository that holds the workload's file, or the current folder if the workload is a module:"
            " `folder`, `commit`, `changes`, the diff of uncommitted changes, `changes_sha256`, its digest, and `note`,"
            " why something is missing; null without git or a repository"
        ),
    },
    STATE_FILE: {
        "format": Entry("5"),
        "epoch": Entry("finished epochs"),
        "step": Entry("finished steps of the next epoch"),
        "config": Entry("the settings of the training, as in `config.json`"),
        "workload": Entry(
            "the workload's file or module, its SHA-256, your settings and the metadata: enough to create the model"
            " again"
        ),
        "metrics": Entry(
            "the figures of the epoch so far: `train_loss`, `val_loss` and so on, `val_score`, the pair"
            " (metric, −loss) by which checkpoints are compared, and `is_over`, whether the training ends here"
        ),
        "versions": Entry("of Python, PyTorch, Ray, NumPy and this package"),
        "sha256": Entry("the digest of each file, and of `state.json` without this entry"),
    },
}
COLUMNS: Mapping[str, Mapping[str, Entry]] = {
    METRICS_FILE: {
        "epoch": Entry("counted from 1; of a validation within an epoch, with a fraction"),
        "train_METRIC": _TRAINING,
        "val_METRIC": _VALIDATION,
        "gradient_norm": _NORM,
        "epoch_s": Entry("seconds of the epoch's training"),
        "examples_per_s": _RATE,
        "val_s": Entry("seconds of the validation"),
        "val_SET_METRIC": Entry("on each further validation set, by its name", is_optional=True),
    },
    STEPS_FILE: {
        "step": Entry("counted from 1, over all epochs"),
        "epoch": Entry("counted from 1, with a fraction"),
        "train_METRIC": _TRAINING,
        "learning_rate": Entry("of the last step, in the optimizer's first parameter group"),
        "gradient_norm": _NORM,
        **{f"{part}_s": _TIME for part in (*_TIMES, "start")},
    },
    COLUMNS_FILE: {
        "index": Entry("the example's place in its data"),
        "loss": Entry("the example's loss"),
        "label": Entry("of a `Classification`: the class, by its number", is_optional=True),
        "prediction": Entry("the predicted class, by its number; of a `Regression`, the value", is_optional=True),
        "probability": Entry("of a `Classification`: the probability of the prediction", is_optional=True),
        "probabilities": Entry("of a `Classification`: the probability of each class", is_optional=True),
        "target": Entry("of a `Regression`: the true value", is_optional=True),
        "fold": Entry("after a cross-validation: the fold of each training example", is_optional=True),
    },
    MEMBERS_FILE: {
        "member": Entry("the run's number, from 1 on in the order of starts"),
        "run": Entry("its folder in `members/`"),
        "seed": Entry("of the run"),
        "fold": Entry("of the run; empty without folds"),
        "state": Entry("`done`, `stopped early`, `failed`, `lost`, `running` or `waiting`"),
        "epochs": Entry("epochs trained, perhaps with a fraction"),
        "val_METRIC": _VALIDATION,
        "train_loss": Entry("mean over the last epoch's examples"),
        "examples_per_s": _RATE,
        "train_s": Entry("seconds of training"),
        "reports": Entry("`EPOCHS:VALUE` of the workload's first metric, for each report"),
        "reason": Entry("why the run failed or was lost"),
    },
}
FILES: Mapping[str, Mapping[str, Entry]] = {
    "run": {
        CONFIG_FILE: Entry("all settings, by the names of their [flags](flags.md); `--config` reads it"),
        ORIGIN_FILE: Entry("[where the run comes from](#the-origin-of-a-run)"),
        REPORT_FILE: Entry("the report with its plots, written at the end, even if the run was interrupted"),
        METRICS_FILE: Entry(
            "a row per epoch or validation; [after a kill](../understand/failures.md#resuming), perhaps with gaps"
        ),
        COLUMNS_FILE: Entry(
            "the columns of `predictions` as arrays; above 256 MiB, the largest columns are left out", is_optional=True
        ),
        STEPS_FILE: Entry("a row about every half second; beyond 10,000 rows, neighbours are merged in pairs"),
        "events.out.tfevents.N": Entry("for TensorBoard"),
        INITIAL_FILE: Entry("with `--init-from`: the weights that the run starts from", is_optional=True),
        RESULT_FILE: Entry("the [result](#the-result), once the run is tested"),
        "checkpoint_epoch-E_step-S": Entry(
            "[checkpoints](#a-checkpoint); [which are kept](../understand/checkpoints.md#which-are-kept)"
        ),
    },
    "job of many runs": {
        MEMBERS_FILE: Entry("a row per run"),
        MEMBERS_FOLDER: Entry(
            "the folder of each run, such as `seed-0_fold-1` or `batch_size-64_learning_rate-0.01_seed-0`, with the"
            " files of any run. Of a sweep, only the runs of the best configuration are tested; a trial that was"
            " stopped early has no report; each trial that has ended keeps one checkpoint"
        ),
        BEST_FILE: Entry(
            "of a sweep: the best configuration, with its workers; `python jobs/train.py --config best.json` trains it"
            " to the same bits",
            is_optional=True,
        ),
    },
    "checkpoint": {
        "model.safetensors": Entry("the weights; with `--ema-decay`, their average"),
        "trained.safetensors": Entry("with `--ema-decay`: the trained weights", is_optional=True),
        "optimizer.safetensors": Entry("the tensors of the optimizer's state"),
        "training.pt": Entry("the rest of the training's state: counters, sums, schedule, loss scale, callbacks"),
        STATE_FILE: Entry("a description of all"),
    },
}


def flaw_of(file_name: str, values: Any) -> str:
    """Return what is wrong with the content of a JSON file; an empty text if nothing is."""
    if not isinstance(values, dict):
        return "it is not a JSON object"
    if not values:
        return "it is empty"
    for name, entry in KEYS.get(file_name, {}).items():
        if not entry.is_right(values.get(name, ...)):
            return entry.flaw
    return ""
