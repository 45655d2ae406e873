"""Predicts the rows of many files in Ray actors; started again after any interruption, it does what is missing.

Parts are facts: which rows a part has is written down before anything is predicted, and a part's predictions are one
file, which gets its name when it is whole. So a part is done or not, whatever was killed, and each row is there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import posixpath
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
import torch
from pyarrow import fs
from pyarrow import parquet as pq
from ray.exceptions import RayActorError, RayError, RayTaskError

from mnist_ray.checkpoints.find import Found, weights_digest
from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.cluster.connection import Connection
from mnist_ray.cluster.devices import device_here
from mnist_ray.cluster.plan import Cluster, cpus_for_each, plan_workers
from mnist_ray.config import ScaleConfig, WorkerConfig
from mnist_ray.errors import JobError, UsageError, first_line
from mnist_ray.predictions.inputs import Chunk, DamagedTableError, Inputs, find_inputs
from mnist_ray.predictions.predictor import Predictor
from mnist_ray.process import usable_cores
from mnist_ray.report.console import RunConsole
from mnist_ray.signals import if_ended
from mnist_ray.storage import RunFolder, in_one_line, is_foreign, locate
from mnist_ray.text import clock_time, count
from ray_fork.starting import Forking

_JOB_FILE = "_job.json"  # names that begin with _ are passed over by readers of the folder
_DONE, _UNREADABLE, _TEMPORARY = "_done", "_unreadable", "_temporary"
_NUM_THREADS = 16  # that read small files
_MAX_RETRIES = 3  # of a part whose actor dies
_RESUME = "; rerun the same command to resume"

Done = dict[str, dict[str, int]]
"""By part, how many predictions it has, and how many inputs have none."""


def predict_at_scale(found: Found, config: ScaleConfig, forking: Forking) -> dict[str, Any]:
    """Predict an input into a folder; print a summary and return it. Raises UsageError and JobError."""
    if config.input is None or config.output is None:
        raise UsageError("--input and --output belong together: give both")
    inputs, folder = find_inputs(config.input, found.workload, config.column), locate(config.output, "", "--output")
    with in_one_line(f"cannot read {found.checkpoint.uri}"):
        weights = weights_digest(read_state(found.checkpoint))
    column = [*found.workload.metadata.get("column_names", config.column)]
    asked = {"checkpoint": weights, "input": config.input, "column": column}
    with RunConsole(found.workload, 0, quiet=False) as console:
        for note in found.notes:
            console.say("note", note)
        console.say("checkpoint", found.checkpoint.path)
        inputs = _begun(folder, asked, inputs)
        done = _done_parts(folder, inputs.parts)
        already = f", {len(done):,} already predicted" if done else ""
        columns = f"; columns: {', '.join(inputs.columns)}" if inputs.columns else ""
        in_parts = f"{inputs.kind} in {count(len(inputs.parts), 'part')}"
        console.say("input", f"{config.input}: {in_parts}{already}{columns}")
        if left := {part: files for part, files in inputs.parts.items() if part not in done}:
            with _resumable():
                inputs = dataclasses.replace(inputs, parts=left)
                done |= _predicted(found, inputs, folder, config, forking, console)
        with in_one_line(f"cannot write {folder.uri}"):
            folder.inside(_TEMPORARY).delete()
        rows, unreadable = (sum(about[name] for about in done.values()) for name in ("rows", "unreadable"))
        reasons = f" (reasons: {folder.inside(_UNREADABLE).uri})" if unreadable else ""
        console.result("predicted", f"{rows:,} {found.workload.nouns}, {unreadable:,} unreadable{reasons}")
        console.say("output", config.output)
        return {"rows": rows, "unreadable": unreadable}


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Let what ends the block say how to resume."""
    if_ended(_RESUME)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted{_RESUME}") from interrupt
    except JobError as error:
        raise JobError(f"{error}{_RESUME}") from error


def _begun(folder: RunFolder, asked: Mapping[str, Any], inputs: Inputs) -> Inputs:
    """Write down the parts of a new folder; of a begun one, return them.

    Raises UsageError if the folder is of another job or another user, and JobError if somebody has changed it.
    """
    known = folder.read_json(_JOB_FILE)
    if known is None:
        with in_one_line(f"cannot read {folder.uri}"):
            there = folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
        if others := [info.base_name for info in there if not info.base_name.startswith(_JOB_FILE)]:
            raise UsageError(f"--output {folder.uri} holds other files ({others[0]}); choose an empty folder")
        known = {"asked": asked, "columns": inputs.columns, "parts": inputs.parts}
        folder.write_text(_JOB_FILE, json.dumps(known))
        return inputs
    if isinstance(folder.filesystem, fs.LocalFileSystem) and is_foreign(posixpath.join(folder.path, _JOB_FILE)):
        raise UsageError(f"--output {folder.uri} was begun by another user; choose another folder")
    try:
        if different := [name for name, value in asked.items() if known["asked"].get(name) != value]:
            what = f"predictions with another {different[0]}"
            raise UsageError(f"--output {folder.uri} holds {what}; choose another folder")
        return dataclasses.replace(inputs, columns=tuple(known["columns"]), parts=dict(known["parts"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise folder.damaged(_JOB_FILE, error) from error


def _done_parts(folder: RunFolder, parts: Mapping[str, Any]) -> Done:
    """Return what is known of the parts that are done: those whose predictions can be read and have all rows."""
    known = folder.inside(_DONE)
    with in_one_line(f"cannot read {folder.uri}"), ThreadPoolExecutor(_NUM_THREADS) as threads:
        infos = folder.filesystem.get_file_info(fs.FileSelector(known.path, allow_not_found=True, recursive=True))
        names = {posixpath.relpath(info.path, known.path) for info in infos}
        done = [part for part in parts if f"{part}.json" in names]
        by_part = dict(zip(done, threads.map(known.require_json, (f"{part}.json" for part in done)), strict=True))
        num_rows = dict(zip(done, threads.map(functools.partial(_num_rows, folder), done), strict=True))
    whole = {part: about for part, about in by_part.items() if {"rows", "unreadable"} <= about.keys()}
    return {part: about for part, about in whole.items() if about["rows"] == num_rows[part]}


def _num_rows(folder: RunFolder, part: str) -> int:
    """Return how many predictions a part's file has; 0 if there is no file, or it is damaged. Raises STORAGE_ERRORS."""
    try:
        with folder.filesystem.open_input_file(posixpath.join(folder.path, part)) as file:
            return int(pq.read_metadata(file).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):
        return 0


def _predicted(
    found: Found,
    inputs: Inputs,
    folder: RunFolder,
    config: ScaleConfig,
    forking: Forking,
    console: RunConsole,
) -> Done:
    """Predict parts in actors, and show the progress."""
    workers = WorkerConfig(plain_ray=config.plain_ray, use_gpu=config.use_gpu)
    with Connection(workers, forking).opened(functools.partial(console.say, "note")) as cluster:
        use_gpu = plan_workers(workers, cluster).use_gpu
        number, cpus, gpus = _resources(cluster, config, len(inputs.parts), use_gpu)
        console.say("actors", f"{number} × {count(cpus, 'CPU')}" + (f" and {gpus:.3g} GPU" if gpus else ""))
        actor = ray.remote(PartPredictor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=_MAX_RETRIES
        )
        without_parts = dataclasses.replace(inputs, parts={})
        actors = [actor.remote(found, without_parts, folder, cpus) for _ in range(number)]
        done, begun, nouns = Done(), time.monotonic(), found.workload.nouns
        try:
            for part, known in _results(actors, inputs.parts):
                done[part] = known
                num_rows, seconds = sum(known["rows"] for known in done.values()), time.monotonic() - begun
                rate, left = num_rows / seconds, clock_time(seconds * (len(inputs.parts) / len(done) - 1))
                console.show_now("predicting", f"{num_rows:,} {nouns}  {rate:,.0f} {nouns}/s  {left} left")
        finally:
            for actor in actors:  # Ray would restart them as long as an error's traceback refers to them
                ray.kill(actor)
        return done


def _resources(cluster: Cluster, config: ScaleConfig, num_parts: int, use_gpu: bool) -> tuple[int, int, float]:
    """Return the number of actors, and the CPUs and GPUs of each."""
    free = {name: int(ray.available_resources().get(name, 0)) for name in ("CPU", "GPU")}
    num_gpus = max(1, free["GPU"]) if use_gpu else 0
    number = max(1, min(config.num_actors or num_gpus or free["CPU"], free["CPU"], num_parts))
    cpus = cpus_for_each(cluster.nodes, number, None, False) or 1
    return number, max(1, min(cpus, free["CPU"] // number)), min(1.0, num_gpus / number)


def _results(actors: Sequence[Any], parts: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let each actor predict a part at a time; yield each part's name and what is known of it. Raises JobError.

    Ray starts an actor that has died again, and its part with it.
    """
    idle, waiting, running = [*actors], iter(parts.items()), dict[Any, tuple[Any, str]]()
    while True:
        for actor, (part, files) in zip(idle, waiting, strict=False):
            running[actor.predict.remote(part, files)] = actor, part
        if not running:
            return
        (result,), _ = ray.wait([*running])
        actor, part = running.pop(result)
        idle = [actor]
        try:
            yield part, ray.get(result)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, (UsageError, JobError)):
                raise JobError(str(cause)) from error
            what = f"{_MAX_RETRIES + 1} actors died" if isinstance(error, RayActorError) else type(cause).__name__
            raise JobError(f"cannot predict {part}: {what}: {first_line(cause)}") from error


class PartPredictor:
    """An actor's model, which predicts parts."""

    def __init__(self, found: Found, inputs: Inputs, folder: RunFolder, cpus: int) -> None:
        self._found, self._inputs, self._folder = found, inputs, folder
        torch.set_num_threads(min(cpus, usable_cores()))

    @functools.cached_property
    def _predictor(self) -> Predictor:
        return Predictor.of(self._found, device_here())

    def predict(self, part: str, files: Sequence[str]) -> dict[str, int]:
        """Predict a part: write its predictions, then the reasons why rows have none; last, that the part is done.

        Returns what is known of the part. Raises UsageError and JobError.
        """
        with in_one_line(f"cannot predict {part}"):
            try:
                rows, reasons = self._write(part, files)
            except DamagedTableError as error:  # nothing of it is written
                rows, reasons = 0, {part: str(error)}
        if reasons:
            lines = [json.dumps({"input": place, "reason": reason}) for place, reason in reasons.items()]
            self._folder.inside(_UNREADABLE).write_text(f"{part}.jsonl", "\n".join(lines) + "\n")
        done = {"rows": rows, "unreadable": len(reasons)}
        self._folder.inside(_DONE).write_text(f"{part}.json", json.dumps(done))
        return done

    def _write(self, part: str, files: Sequence[str]) -> tuple[int, dict[str, str]]:
        """Write a part's predictions; return their number, and by place the reasons why rows have none."""
        num_rows, reasons = 0, dict[str, str]()
        with _new_file(self._folder, part) as stream, contextlib.ExitStack() as at_the_end:
            writer: pq.ParquetWriter | None = None
            for chunk in self._inputs.chunks(part, files, self._predictor):
                rows, wrong = predicted(self._predictor, chunk)
                if writer is None:
                    writer = at_the_end.enter_context(pq.ParquetWriter(stream, rows.schema))
                writer.write_table(rows.cast(writer.schema))
                reasons |= {chunk.places[row]: wrong[row] for row in sorted(wrong)}
                num_rows += len(rows)
        return num_rows, reasons


def predicted(predictor: Predictor, chunk: Chunk) -> tuple[pa.Table, dict[int, str]]:
    """Return the rows that have a prediction, with its columns, and by row the reason why others have none.

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
    table = chunk.rows.take(pa.array(rows, pa.int64()))
    for name, values in columns.items():
        column = pa.array(values.ravel())
        if values.ndim == 2:
            column = pa.FixedSizeListArray.from_arrays(column, values.shape[1])
        table = table.append_column(name, column)
    return table, wrong


@contextlib.contextmanager
def _new_file(folder: RunFolder, name: str) -> Iterator[Any]:
    """Open a file that gets its name at the end. Raises STORAGE_ERRORS."""
    target, temporary = (posixpath.join(folder.path, path) for path in (name, f"{_TEMPORARY}/{uuid4().hex}"))
    for path in (target, temporary):
        folder.create_folder_of(path)
    with folder.filesystem.open_output_stream(temporary) as stream:
        yield stream
    folder.filesystem.move(temporary, target)
