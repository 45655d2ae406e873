"""Writes a trained model as a file for other programs: ``jobs/export.py`` after flag parsing."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mnist_ray.config import ExportConfig
from mnist_ray.errors import JobError, UsageError, say
from mnist_ray.run.find import Found
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.training.batches import batches_of
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data

Run = Callable[[Tensor], Tensor]
_TOLERANCE = 1e-4
_NUM_COMPARED = 512


def export(found: Found, config: ExportConfig) -> None:
    """Write a checkpoint's model as a program, and compare the outputs of both. Raises UsageError and JobError."""
    is_onnx = config.format == "onnx"
    if is_onnx and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UsageError("--format onnx needs more packages: pip install -e '.[onnx]'")
    suffix = ".onnx" if is_onnx else ".pt2"
    path = path_of(config.output or f"model{suffix}", "--output")
    if path.suffix != suffix:
        raise UsageError(f"--output {config.output} must end in {suffix} for --format {config.format}")
    workload, model = found.workload, found.load_model()
    shape = workload.metadata.get("model_input")
    if shape is None:
        raise UsageError(f"{type(workload).__name__}: only models that take one tensor can be exported")
    example = torch.zeros((2, *shape["shape"]), dtype=getattr(torch, shape["dtype"]))
    write_file(path, _onnx_program(workload, model, example) if is_onnx else _torch_program(model, example))
    checked = _checked(workload, model, _load_onnx(path) if is_onnx else torch.export.load(path).module(), path)
    with torch.inference_mode():
        result = "".join(f", {size}" for size in model(example).shape[1:])
    inputs = f"(N, {', '.join(map(str, shape['shape']))}) {shape['dtype']}"
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    say(f"{config.format:<10} {path}: {workload.nouns} {inputs} to {workload.output_noun} (N{result})")
    say(f"checked    {checked}")


def _checked(workload: Workload, model: nn.Module, run: Run, path: Path) -> str:
    """Compare a program with the model on test examples; return the result. Raises JobError if they differ."""
    try:
        split = Split(load_data(workload).test, origin="test")
        chosen = Slice(np.arange(min(_NUM_COMPARED, len(split))))
        inputs = workload.prepare(batches_of(split, torch.device("cpu"))[chosen].inputs, None)
    except (UsageError, JobError) as error:
        return f"no: {error}"
    difference, outputs = largest_difference(model, run, inputs), workload.output_noun
    if not difference <= _TOLERANCE:  # also true for NaN
        raise JobError(f"the {outputs} of {path} and of the checkpoint differ by up to {difference:.1e}")
    return f"on {len(inputs):,} test {workload.nouns}: {outputs} differ by at most {difference:.1e}"


def largest_difference(model: nn.Module, run: Run, inputs: Tensor) -> float:
    """Return the largest difference between the outputs of two models; NaN if an output is NaN."""
    with torch.inference_mode():
        return float((model(inputs) - run(inputs)).abs().max())


def _free_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _torch_program(model: nn.Module, example: Tensor) -> bytes:
    content = io.BytesIO()
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=_free_batch()), content)
    return content.getvalue()


def _onnx_program(workload: Workload, model: nn.Module, example: Tensor) -> bytes:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter, about torch's own code
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=_free_batch(),
            input_names=[workload.nouns],
            output_names=[workload.output_noun],
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def _load_onnx(path: Path) -> Run:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: np.ascontiguousarray(inputs.numpy())})[0])
