"""Predicts the rows of many files in Ray actors; started again after any interruption, it does what is missing.

Parts are facts: which rows a part has is written down before anything is predicted, and a part's predictions are one
file, which gets its name when it is whole. So a part is done or not, whatever was killed, and each row is there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import torch
from pyarrow import fs
from pyarrow import parquet as pq
from ray.exceptions import RayActorError, RayError, RayTaskError

from mnist_ray.checkpoints.find import Found
from mnist_ray.checkpoints.saved_model import weights_digest
from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.devices import device_here, is_gpu_wanted
from mnist_ray.cluster.plan import Cluster, cpus_for_each
from mnist_ray.config import ScaleConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.predictions.inputs import Chunk, DamagedTableError, Inputs, find_inputs
from mnist_ray.predictions.predictor import Predictor
from mnist_ray.process import usable_cores
from mnist_ray.report.console import RunConsole
from mnist_ray.signals import if_ended
from mnist_ray.storage import RunFolder, in_one_line, is_foreign, locate
from mnist_ray.text import clock_time, count
from mnist_ray.workload.base import Workload
from ray_fork.starting import Forking

_JOB_FILE = "_job.json"  # names that begin with _ are passed over by readers of the folder
_DONE, _UNREADABLE, _TEMPORARY = "_done", "_unreadable", "_temporary"
_NUMBERS = ("rows", "unreadable", "unsure")
_NUM_THREADS = 16  # that read small files
_MAX_COUNTS = 20  # predictions in the summary
_MAX_RETRIES = 3  # of a part whose actors die
_RESUME = "; rerun the same command to resume"


def predict_at_scale(found: Found, config: ScaleConfig, threshold: float, forking: Forking) -> dict[str, Any]:
    """Predict an input into a folder; print a summary and return it. Raises UsageError and JobError."""
    if config.input is None or config.output is None:
        raise UsageError("--input and --output belong together: give both")
    inputs, folder = find_inputs(config.input, found.workload, config.column), locate(config.output, "", "--output")
    with in_one_line(f"cannot read {found.checkpoint.uri}"):
        weights = weights_digest(read_state(found.checkpoint))
    column = [*found.workload.metadata.get("column_names", config.column)]
    asked = {"checkpoint": weights, "input": config.input, "column": column, "threshold": threshold}
    with RunConsole(found.workload, 0, quiet=False) as console:
        for note in found.notes:
            console.say("note", note)
        console.say("checkpoint", found.checkpoint.path)
        inputs = _begun(folder, asked, inputs, console)
        done = _done_parts(folder, inputs)
        parts = {part: files for part, files in inputs.parts.items() if part not in done}
        left = dataclasses.replace(inputs, parts=parts)
        names = ", ".join(inputs.columns)
        columns = f", columns {names} in this order" if len(inputs.columns) > 1 else f", column {names}"
        already = f", {len(done):,} already predicted" if done else ""
        console.say(
            "input",
            f"{config.input}: {inputs.kind} in {count(len(inputs.parts), 'part')}{already}{columns if names else ''}",
        )
        if parts:
            if_ended(_RESUME)
            try:
                done |= _predicted(found, left, folder, config, threshold, forking, console)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(f"interrupted{_RESUME}") from interrupt
            except JobError as error:
                raise JobError(f"{error}{_RESUME}") from error
        with in_one_line(f"cannot write {folder.uri}"):
            folder.inside(_TEMPORARY).delete()
        summary = _summary(done, found.workload, threshold, console)
        if summary["unreadable"]:
            console.say("unreadable", f"reasons in {folder.inside(_UNREADABLE).uri}")
        console.say("output", config.output)
        return summary


def _begun(folder: RunFolder, asked: Mapping[str, Any], inputs: Inputs, console: RunConsole) -> Inputs:
    """Write down the parts of a new folder; of a begun one, return them. Raises UsageError if it is of another job."""
    known = _known_job(folder)
    if known is None:
        with in_one_line(f"cannot read {folder.uri}"):
            there = folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
        if others := [info.base_name for info in there if not info.base_name.startswith(_JOB_FILE)]:
            raise UsageError(f"--output {folder.uri} holds other files ({others[0]}); choose an empty folder")
        known = {"asked": asked, "kind": inputs.kind, "columns": inputs.columns, "parts": inputs.parts}
        folder.write_text(_JOB_FILE, json.dumps(known))
        return inputs
    if different := [name for name, value in asked.items() if known["asked"].get(name) != value]:
        raise UsageError(f"--output {folder.uri} holds predictions with another {different[0]}; choose another folder")
    begun = {file for files in known["parts"].values() for file in files}
    if new := {file for files in inputs.parts.values() for file in files} - begun:
        console.say("note", f"{count(len(new), 'file')} came after the first start, and will not be predicted")
    return dataclasses.replace(inputs, columns=tuple(known["columns"]), parts=known["parts"])


def _known_job(folder: RunFolder) -> dict[str, Any] | None:
    """Return what a begun folder has written down; None for a new one.

    Raises UsageError if another user has begun it, and JobError if somebody has changed it.
    """
    known = folder.read_json(_JOB_FILE)
    if known is None:
        return None
    if isinstance(folder.filesystem, fs.LocalFileSystem) and is_foreign(posixpath.join(folder.path, _JOB_FILE)):
        raise UsageError(f"--output {folder.uri} was begun by another user; choose another folder")
    try:
        paths = [path for part, files in known["parts"].items() for path in (part, *files)]
        if not isinstance(known["asked"], dict) or any(
            "" in path.split("/") or ".." in path.split("/") for path in paths
        ):
            raise ValueError("its parts lead out of the folders")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise folder.damaged(_JOB_FILE, error) from error
    return known


def _done_parts(folder: RunFolder, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return what is known of the parts that are done: those whose predictions can be read and have all rows."""
    done = folder.inside(_DONE)
    with in_one_line(f"cannot read {done.uri}"), ThreadPoolExecutor(_NUM_THREADS) as threads:
        infos = done.filesystem.get_file_info(fs.FileSelector(done.path, allow_not_found=True, recursive=True))
        names = [posixpath.relpath(info.path, done.path) for info in infos if info.path.endswith(".json")]
        parts = dict(zip((name[:-5] for name in names), threads.map(done.require_json, names), strict=True))
    for part, known in parts.items():
        if not {*_NUMBERS, "counts"} <= known.keys():
            raise done.damaged(f"{part}.json", "numbers are missing")
    with in_one_line(f"cannot read {folder.uri}"), ThreadPoolExecutor(_NUM_THREADS) as threads:
        are_whole = [*threads.map(functools.partial(_is_whole, folder, inputs), parts, parts.values())]
    return {part: known for (part, known), is_whole in zip(parts.items(), are_whole, strict=True) if is_whole}


def _is_whole(folder: RunFolder, inputs: Inputs, part: str, known: Mapping[str, Any]) -> bool:
    try:
        num_rows = inputs.num_predicted(folder, part)
    except DamagedTableError:  # such as a missing file; a part without rows may have none
        num_rows = 0
    return part in inputs.parts and num_rows == known["rows"]


def _predicted(
    found: Found,
    inputs: Inputs,
    folder: RunFolder,
    config: ScaleConfig,
    threshold: float,
    forking: Forking,
    console: RunConsole,
) -> dict[str, dict[str, Any]]:
    """Predict parts in actors, and show the progress. Return what is known of the parts."""
    connection = Connection(WorkerConfig(plain_ray=config.plain_ray, use_gpu=config.use_gpu), forking)
    with connection.opened(functools.partial(console.say, "note")) as cluster:
        use_gpu = is_gpu_wanted(config.use_gpu, cluster)
        number, cpus, gpus = _resources(cluster, config, len(inputs.parts), use_gpu)
        console.say("actors", f"{number} × {count(cpus, 'CPU')}" + (f" and {gpus:.3g} GPU" if gpus else ""))
        arguments = dataclasses.replace(inputs, parts={}), folder, threshold, cpus
        actor = ray.remote(PartPredictor).options(num_cpus=cpus, num_gpus=gpus)
        create = functools.partial(actor.remote, found, *arguments)
        done, num_rows, begun, nouns = dict[str, dict[str, Any]](), 0, math.inf, found.workload.nouns
        for part, known in _results(create, number, inputs.parts):
            done[part] = known
            num_rows += known["rows"]
            begun = min(begun, time.monotonic() - known["seconds"])  # without the start of the actors
            seconds = time.monotonic() - begun
            rate, left = f"{num_rows / seconds:,.0f} {nouns}/s", seconds * (len(inputs.parts) / len(done) - 1)
            line = f"{num_rows:,} {nouns}  {rate}  {clock_time(left)} left"
            console.show_now("predicting", line)
        console.say("", f"{rate}, {seconds:.1f} s without the start of the actors")
        return done


def _results(
    create: Callable[[], Any], number: int, parts: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let a number of actors predict a part at a time; yield each part's name and what is known of it.

    A new actor replaces one that has died. Raises JobError.
    """
    waiting, num_lost = iter(parts), Counter[str]()
    running = dict[Any, tuple[Any, str]]()  # by the reference to the result

    def start(actor: Any, part: str) -> None:
        running[actor.predict.remote(part, parts[part])] = actor, part

    for part in islice(waiting, number):
        start(create(), part)
    while running:
        (result,), _ = ray.wait([*running])
        actor, part = running.pop(result)
        try:
            yield part, ray.get(result)
        except RayActorError as error:
            num_lost[part] += 1
            if num_lost[part] > _MAX_RETRIES:
                raise JobError(f"cannot predict {part}, in {num_lost[part]} actors: {first_line(error)}") from error
            start(create(), part)
            continue
        except RayTaskError as error:
            if isinstance(error.cause, (UsageError, JobError)):
                raise JobError(str(error.cause)) from error
            raise JobError(f"cannot predict {part}: {type(error.cause).__name__}: {first_line(error.cause)}") from error
        except RayError as error:
            raise JobError(f"cannot predict {part}: {first_line(error)}") from error
        for following in islice(waiting, 1):
            start(actor, following)


def _resources(cluster: Cluster, config: ScaleConfig, num_parts: int, use_gpu: bool) -> tuple[int, int, float]:
    """Return the number of actors, and the CPUs and GPUs of each."""
    free = {name: int(ray.available_resources().get(name, 0)) for name in ("CPU", "GPU")}
    num_gpus = max(1, free["GPU"]) if use_gpu else 0
    number = max(1, min(config.num_actors or num_gpus or free["CPU"], free["CPU"], num_parts))
    cpus = cpus_for_each(cluster.nodes, number, None, False) or 1
    return number, max(1, min(cpus, free["CPU"] // number)), min(1.0, num_gpus / number)


def _summary(
    done: Mapping[str, Mapping[str, Any]], workload: Workload, threshold: float, console: RunConsole
) -> dict[str, Any]:
    """Print and return how many rows there are, of which predictions, and how many are unsure or unreadable."""
    totals: dict[str, int] = {name: sum(part[name] for part in done.values()) for name in _NUMBERS}
    counts = sum((Counter(part["counts"]) for part in done.values()), Counter[str]())
    rows, unreadable, unsure = totals.values()
    console.result("predicted", f"{rows:,} {workload.nouns}, {unreadable:,} unreadable")
    if counts:
        most = [f"{prediction} {number:,}" for prediction, number in sorted(counts.items())[:_MAX_COUNTS]]
        more = f" and {len(counts) - _MAX_COUNTS:,} more" if len(counts) > _MAX_COUNTS else ""
        console.say(f"{workload.prediction_noun}", ", ".join(most) + more)
        console.say("unsure", f"{unsure:,} ({unsure / max(1, rows):.1%}) below {threshold:g}")
    return {**totals, "counts": dict(counts)}


class PartPredictor:
    """An actor's model, which predicts parts."""

    def __init__(self, found: Found, inputs: Inputs, folder: RunFolder, threshold: float, cpus: int) -> None:
        self._found, self._inputs, self._folder = found, inputs, folder
        self._threshold = threshold
        torch.set_num_threads(min(cpus, usable_cores()))

    @functools.cached_property
    def _predictor(self) -> Predictor:
        return Predictor.of(self._found, device_here())

    def predict(self, part: str, files: Sequence[str]) -> dict[str, Any]:
        """Predict a part; return its numbers and the seconds. Raises UsageError and JobError."""
        self._predictor  # noqa: B018
        begun = time.monotonic()
        with in_one_line(f"cannot predict {part}"):
            done = self._predict(part, files)
        return {**done, "seconds": time.monotonic() - begun}

    def _predict(self, part: str, files: Sequence[str]) -> dict[str, Any]:
        """Write a part's predictions, then the reasons why rows have none; last, that the part is done."""
        totals, counts, reasons = dict.fromkeys(_NUMBERS, 0), Counter[str](), list[str]()
        try:
            with _new_file(self._folder, part) as stream, contextlib.closing(ParquetFile(stream)) as writer:
                for chunk in self._inputs.chunks(part, files, self._predictor):
                    readable, columns, wrong = predicted(self._predictor, chunk)
                    writer.write(readable, columns)
                    totals["rows"] += len(readable)
                    reasons += [json.dumps({"input": chunk.places[row], "reason": wrong[row]}) for row in sorted(wrong)]
                    if "probability" in columns:
                        totals["unsure"] += int((columns["probability"] < self._threshold).sum())
                        if columns["prediction"].dtype.kind in "biuU":  # classes
                            counts.update(map(str, columns["prediction"].tolist()))
        except DamagedTableError as error:  # nothing of it is written
            totals, counts = dict.fromkeys(_NUMBERS, 0), Counter()
            reasons = [json.dumps({"input": part, "reason": str(error)})]
        if reasons:
            totals["unreadable"] = len(reasons)
            self._folder.inside(_UNREADABLE).write_text(f"{part}.jsonl", "\n".join(reasons) + "\n")
        done = {**totals, "counts": counts}
        self._folder.inside(_DONE).write_text(f"{part}.json", json.dumps(done))
        return done


def predicted(predictor: Predictor, chunk: Chunk) -> tuple[pa.Table, dict[str, np.ndarray], dict[int, str]]:
    """Return the rows that have a prediction, the predictions, and by row the reason why there is none.

    If no row can be computed, the model is the cause, or the choice of the column: raises UsageError.
    """
    wrong = {row: str(given) for row, given in enumerate(chunk.inputs) if isinstance(given, JobError)}
    rows = [row for row in range(len(chunk.inputs)) if row not in wrong]
    try:
        columns = predictor.columns(chunk.inputs[row] for row in rows)
    except UsageError:
        failed = {}
        for row in rows:
            try:
                predictor.columns([chunk.inputs[row]])
            except UsageError as error:
                failed[row] = str(error)
        if len(failed) == len(rows):
            raise
        wrong |= failed
        rows = [row for row in rows if row not in failed]
        columns = predictor.columns(chunk.inputs[row] for row in rows)
    if not (is_number := _are_numbers(columns)).all():
        wrong |= {rows[index]: "the prediction is not a finite number" for index in np.flatnonzero(~is_number)}
        rows = [row for row in rows if row not in wrong]
        columns = {name: values[is_number] for name, values in columns.items()}
    return chunk.rows.take(pa.array(rows, pa.int64())), columns, wrong


def _are_numbers(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return whether each prediction, and all of its probabilities, are finite, (N,); texts are, too."""
    is_number = np.ones(len(columns["prediction"]), bool)
    for values in (columns["prediction"], columns.get("probabilities", is_number)):
        if values.dtype.kind == "f":
            is_number &= np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    return is_number


@contextlib.contextmanager
def _new_file(folder: RunFolder, name: str) -> Iterator[Any]:
    """Open a file that gets its name at the end. Raises STORAGE_ERRORS."""
    target, temporary = (posixpath.join(folder.path, path) for path in (name, f"{_TEMPORARY}/{uuid4().hex}"))
    for path in (target, temporary):
        folder.create_folder_of(path)
    with folder.filesystem.open_output_stream(temporary) as stream:
        yield stream
    folder.filesystem.move(temporary, target)


class ParquetFile:
    """Writes tables."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pa.Table, columns: dict[str, np.ndarray]) -> None:
        """Write rows. Raises pyarrow.ArrowException if they do not fit those before."""
        for name, values in columns.items():
            rows = rows.append_column(name, _array(values))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, rows.schema)
        self._writer.write_table(rows.cast(self._writer.schema))

    def close(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()


def _array(values: np.ndarray) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)
