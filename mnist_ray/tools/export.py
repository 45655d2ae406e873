"""A trained model as a file for other programs: ``jobs/export.py`` once its flags are read."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable
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
from mnist_ray.training.batches import batches_of
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.source import load_data

Run = Callable[[Tensor], Tensor]
_TOLERANCE = 1e-4
_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
_NUM_COMPARED = 512


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
    outputs, checked = workload.output_noun, _checked(workload, model, load(path), path)
    example = _example(workload)
    shape = ", ".join(map(str, example.shape[1:]))
    kind = str(example.dtype).removeprefix("torch.")
    with torch.inference_mode():
        result = ", ".join(map(str, model(example).shape[1:]))
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    say(f"{config.format:<10} {path}: {workload.nouns} (N, {shape}) {kind} to {outputs} (N{result and ', ' + result})")
    say(f"checked    {checked}")


def _checked(workload: Workload, model: nn.Module, run: Run, path: Path) -> str:
    """Compare a program with the model on test examples; return what came out. Raises JobError if they differ."""
    try:
        batches = _batches_to_compare_on(workload)
    except (UsageError, JobError) as error:
        return f"not: {error}"
    difference, outputs = largest_difference(model, run, batches), workload.output_noun
    if not difference <= _TOLERANCE:  # nor if it is NaN
        raise JobError(f"{path} does not do what the checkpoint does: its {outputs} differ by up to {difference:.1e}")
    return f"on {len(batches[-1]):,} test {workload.nouns}: {outputs} differ by at most {difference:.1e}"


def _batches_to_compare_on(workload: Workload) -> list[Tensor]:
    """Return test examples, prepared, as a batch of one and a larger one: the batch's size is to be free."""
    split = Split(load_data(workload).test, origin="test")
    batches, number = batches_of(split, torch.device("cpu")), min(_NUM_COMPARED, len(split))
    slices = [Slice(np.arange(1)), Slice(np.arange(number))]
    return [workload.prepare(batches[chosen].inputs, None) for chosen in slices]


def largest_difference(model: nn.Module, run: Run, batches: Iterable[Tensor]) -> float:
    """Return the largest difference of two models' outputs over all examples; NaN if an output is NaN."""
    with torch.inference_mode():
        return float(torch.stack([(model(batch) - run(batch)).abs().max() for batch in batches]).max())


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
