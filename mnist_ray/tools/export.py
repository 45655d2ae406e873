"""A trained model as a file for other programs: ``jobs/export.py`` once its flags are read."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnist_ray import config as settings
from mnist_ray.cluster.connection import quiet_ray
from mnist_ray.config import DataConfig, ExportConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.runs.evaluation import find_checkpoint
from mnist_ray.storage import write_file
from mnist_ray.training.checkpoint import fetch
from mnist_ray.training.engine import to_input
from mnist_ray.workload.mnist import idx as data
from mnist_ray.workload.mnist.idx import IMAGE_SHAPE

Run = Callable[[Tensor], Tensor]
_TOLERANCE = 1e-4
_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
_BATCH_SIZES = (1, 7, 500)  # in turn: the batch is to be free


def export(flags: Mapping[str, Any]) -> None:
    """Write a checkpoint's model as a program, and check that it does the same. Raises UsageError and JobError."""
    quiet_ray()
    config = settings.build(ExportConfig, flags)
    if config.format == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UsageError("--format onnx needs more packages: pip install -e '.[onnx]'")
    path = Path(config.output or _FILES[config.format]).expanduser()
    if path.suffix != Path(_FILES[config.format]).suffix:
        raise UsageError(f"--output {config.output} must end in {Path(_FILES[config.format]).suffix}")
    checkpoint = find_checkpoint(flags.get("run"), flags)
    model, saved = fetch(checkpoint.filesystem, checkpoint.path)
    to_bytes, load = {"torch": (torch_program, _load_torch), "onnx": (onnx_program, _load_onnx)}[config.format]
    write_file(str(path), to_bytes(model))
    name, images = _images_to_check_on(saved.get("data", {}))
    difference = largest_difference(model, load(path), images)
    if not difference <= _TOLERANCE:  # nor where it is NaN
        raise JobError(f"{path} does not do what the checkpoint does: its logits differ by up to {difference:.1e}")
    print(f"checkpoint {checkpoint.path}")
    print(f"{config.format:<10} {path}: images (N, 1, 28, 28) float32 in [0, 1] to logits (N, 10)")
    print(f"checked    on {len(images):,} {name}: logits differ by at most {difference:.1e}")


def _images_to_check_on(own_data: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Return the test images of a checkpoint's own data; where they are not here, as many that are noise."""
    try:
        return "test images", data.find(settings.build(DataConfig, own_data)).load("test").images
    except (UsageError, JobError):
        return "images of noise", np.random.default_rng(0).integers(256, size=(1000, *IMAGE_SHAPE), dtype=np.uint8)


def largest_difference(model: nn.Module, run: Run, images: np.ndarray) -> float:
    """Return the largest difference of two models' logits over images (N, 28, 28), in batches of several sizes.

    NaN where a logit is NaN.
    """
    differences, start, turn = [], 0, 0
    with torch.inference_mode():
        while start < len(images):
            size = _BATCH_SIZES[turn % len(_BATCH_SIZES)]
            batch = to_input(torch.from_numpy(images[start : start + size].copy()))
            differences.append((model(batch) - run(batch)).abs().max())
            start, turn = start + size, turn + 1
    return float(torch.stack(differences).max())


def _example() -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Return inputs to trace a model with, and which of their dimensions are free."""
    return (torch.zeros(2, 1, *IMAGE_SHAPE),), ({0: torch.export.Dim("batch", min=1)},)


def torch_program(model: nn.Module) -> bytes:
    """Return a model as what ``torch.export.load`` reads."""
    inputs, shapes = _example()
    content = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=shapes), content)
    return content.getvalue()


def _load_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def onnx_program(model: nn.Module) -> bytes:
    """Return a model as an ONNX file's content."""
    inputs, shapes = _example()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about torch's own parts
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(logits)

    return run
