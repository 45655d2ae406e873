"""A trained model as a file for other programs: ``jobs/export.py`` once its flags are read."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnist_ray.config import ExportConfig
from mnist_ray.errors import JobError, UsageError, say
from mnist_ray.run import find
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.training.sampler import Slice, batches_of
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data

Run = Callable[[Tensor], Tensor]
_TOLERANCE = 1e-4
_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
_BATCH_SIZES = (1, 7, 500)  # in turn: the batch is to be free
_MOST_COMPARED = 10_000


def export(found: find.Found, config: ExportConfig) -> None:
    """Write a checkpoint's model as a program, and check that it does the same. Raises UsageError and JobError."""
    if config.format == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UsageError("--format onnx needs more packages: pip install -e '.[onnx]'")
    path = path_of(_FILES[config.format] if config.output is None else config.output, "--output")
    if path.suffix != (suffix := Path(_FILES[config.format]).suffix):
        raise UsageError(f"--output {config.output} must end in {suffix} for --format {config.format}")
    workload, model = found.workload, found.load_model()
    to_bytes, load = {"torch": (torch_program, _load_torch), "onnx": (onnx_program, _load_onnx)}[config.format]
    write_file(path, to_bytes(workload, model))
    name, inputs = _inputs_to_check_on(workload)
    number, difference = largest_difference(model, load(path), inputs)
    outputs = workload.output_noun
    if not difference <= _TOLERANCE:  # nor where it is NaN
        raise JobError(f"{path} does not do what the checkpoint does: its {outputs} differ by up to {difference:.1e}")
    example = _example(workload)
    shape = ", ".join(map(str, example.shape[1:]))
    kind = str(example.dtype).removeprefix("torch.")
    with torch.inference_mode():
        result = ", ".join(map(str, model(example).shape[1:]))
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    say(f"{config.format:<10} {path}: {workload.nouns} (N, {shape}) {kind} to {outputs} (N{result and ', ' + result})")
    say(f"checked    on {number:,} {name}: {outputs} differ by at most {difference:.1e}")


def _inputs_to_check_on(workload: Workload) -> tuple[str, Iterator[Tensor]]:
    """Return batches of test examples, prepared; where the data are not here, as many that are noise."""
    try:
        split = Split(load_data(workload).test, origin="test")
    except (UsageError, JobError):
        example = _example(workload)
        noise = torch.rand((1000, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(example.dtype)
        return f"{workload.nouns} of noise", iter(noise[start:stop] for start, stop in _bounds(len(noise)))
    batches = batches_of(split, torch.device("cpu"))
    return f"test {workload.nouns}", (
        workload.prepare(batches[Slice(np.arange(start, stop))].inputs, None)
        for start, stop in _bounds(min(_MOST_COMPARED, len(split)))
    )


def _bounds(number: int) -> Iterator[tuple[int, int]]:
    start, turn = 0, 0
    while start < number:
        stop = min(number, start + _BATCH_SIZES[turn % len(_BATCH_SIZES)])
        yield start, stop
        start, turn = stop, turn + 1


def largest_difference(model: nn.Module, run: Run, batches: Iterator[Tensor]) -> tuple[int, float]:
    """Return the number of examples, and the largest difference of two models' outputs over them.

    NaN where an output is NaN.
    """
    number, differences = 0, []
    with torch.inference_mode():
        for batch in batches:
            number += len(batch)
            differences.append((model(batch) - run(batch)).abs().max())
    return number, float(torch.stack(differences).max())


def _example(workload: Workload) -> Tensor:
    """Return inputs to trace a model with. Raises UsageError where the model takes more than a tensor."""
    shape = workload.metadata.get("model_input")
    if shape is None:
        raise UsageError(f"{type(workload).__name__}: only models that take one tensor can be exported")
    return torch.zeros((2, *shape["shape"]), dtype=getattr(torch, shape["dtype"]))


def _free_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def torch_program(workload: Workload, model: nn.Module) -> bytes:
    """Return a model as what ``torch.export.load`` reads."""
    content = io.BytesIO()
    program = torch.export.export(model, (_example(workload),), dynamic_shapes=_free_batch())
    torch.export.save(program, content)
    return content.getvalue()


def _load_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def onnx_program(workload: Workload, model: nn.Module) -> bytes:
    """Return a model as an ONNX file's content."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about torch's own parts
        program = torch.onnx.export(
            model,
            (_example(workload),),
            dynamo=True,
            dynamic_shapes=_free_batch(),
            input_names=[workload.nouns],
            output_names=[workload.output_noun],
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    (name,) = (given.name for given in session.get_inputs())

    def run(inputs: Tensor) -> Tensor:
        (outputs,) = session.run(None, {name: np.ascontiguousarray(inputs.numpy())})
        return torch.from_numpy(outputs)

    return run
