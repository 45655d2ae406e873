"""Writes a trained model as a file for other programs: ``jobs/export.py`` after flag parsing."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from mnist_ray.config import ExportConfig
from mnist_ray.errors import JobError, UsageError, say, with_place
from mnist_ray.run.find import Found
from mnist_ray.settings import path_of
from mnist_ray.storage import write_file
from mnist_ray.training.batches import ArrayBatches, ExampleBatches, batches_of
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Split
from mnist_ray.workload.loading import load_data, placed

Run = Callable[[Any], Any]
_TOLERANCE = 1e-4
_NUM_COMPARED = 512
_BATCH_SIZES = (16, 2, 2, 2, 2)  # several show which sizes vary, such as the length of texts


def export(found: Found, config: ExportConfig) -> Path:
    """Write a checkpoint's model as a program, after comparing the outputs of both; return the file's path.

    Raises UsageError, also if PyTorch cannot export the model, and JobError.
    """
    is_onnx = config.format == "onnx"
    if is_onnx and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UsageError("--format onnx needs more packages: pip install -e '.[onnx]'")
    suffix = ".onnx" if is_onnx else ".pt2"
    path = path_of(config.output or f"model{suffix}", "--output")
    if path.suffix != suffix:
        raise UsageError(f"--output {config.output} must end in {suffix} for --format {config.format}")
    workload, model = found.workload, found.load_model()
    test = test_batches(workload)
    examples = [inputs_of(workload, test, 3 * number, size) for number, size in enumerate(_BATCH_SIZES)]
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(examples)):
        remedy = "to be exported, a model must take tensors, alone or in dicts, lists and tuples"
        raise UsageError(f"{type(workload).__name__}: {remedy}")
    with _explained(workload):
        sizes = pytree.tree_map(_sizes, *examples)
        free = pytree.tree_map(lambda size: Dim.AUTO if isinstance(size, str) else size, sizes)
        program = torch.export.export(model, (examples[0],), dynamic_shapes=(free,))
        inputs = _named(workload.nouns, examples)
        outputs = _named(workload.output_noun, [program.module()(example) for example in examples])
        content, run = _onnx(program, [*inputs], [*outputs]) if is_onnx else _torch(program)
    number = min(_NUM_COMPARED, len(test))
    checked = _checked(workload, model, run, inputs_of(workload, test, 0, number))
    write_file(path, content)
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    taken, returned = (", ".join(map(" ".join, named.items())) for named in (inputs, outputs))
    say(f"{config.format:<10} {path}: {taken} to {returned}")
    say(f"checked    on {number:,} test {workload.nouns}: {checked}")
    return path


def test_batches(workload: Workload) -> ArrayBatches | ExampleBatches:
    """Return the data set of batches of the workload's test set. Raises UsageError and JobError."""
    return batches_of(Split(load_data(workload).test, origin="test"), torch.device("cpu"), workload.collate)


def inputs_of(workload: Workload, batches: ArrayBatches | ExampleBatches, start: int, number: int) -> Any:
    """Return what the model takes for a batch of examples, which are repeated if they are few. Raises UsageError."""
    places = np.arange(start, start + number) % len(batches)
    with placed(workload, "prepare"):
        return workload.prepare(batches[Slice(places)].inputs, None)


@contextlib.contextmanager
def _explained(workload: Workload) -> Iterator[None]:
    """Turn what PyTorch refuses into a UsageError of one line, and let PyTorch itself print nothing."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable()
            yield
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the ONNX exporter's own error gives only advice
            reason = reason.__cause__
        said = f"{with_place(reason, fallback=workload.source.folder)}; see docs/training.md#export"
        raise UsageError(f"{type(workload).__name__}: PyTorch cannot export the model: {said}") from error
    finally:
        logging.disable(logging.NOTSET)


def _sizes(*tensors: Tensor) -> list[int | str]:
    """Return the sizes of a tensor in some batches: ``N`` if as many as examples, else a number or ``any``."""
    sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
    return ["N" if same == _BATCH_SIZES else same[0] if len(set(same)) == 1 else "any" for same in sizes]


def _named(noun: str, batches: Sequence[Any]) -> dict[str, str]:
    """Name the tensors in a model's inputs or outputs after their keys and positions; return their sizes and dtypes."""
    found = {}
    for (place, tensor), *others in zip(*(pytree.tree_flatten_with_path(batch)[0] for batch in batches), strict=True):
        if isinstance(tensor, Tensor):
            name = "_".join(re.findall(r"\w+", f"{noun}{pytree.keystr(place)}"))
            sizes = ", ".join(map(str, _sizes(tensor, *(other for _, other in others))))
            found[name] = f"({sizes}) {tensor.dtype}".replace("torch.", "")
    return found


def _checked(workload: Workload, model: nn.Module, run: Run, inputs: Any) -> str:
    """Compare a program with the model; return the result. Raises JobError if they differ."""
    with _explained(workload):
        difference = largest_difference(model, run, inputs)
    differ = f"{workload.output_noun} differ by at most {difference:.1e}"
    if not difference <= _TOLERANCE:  # also true for NaN
        raise JobError(f"the program and the checkpoint do not agree: their {differ}")
    return differ


def largest_difference(model: nn.Module, run: Run, inputs: Any) -> float:
    """Return the largest difference between the outputs of two models; NaN if an output is NaN."""
    with torch.inference_mode():
        pairs = zip(*(filter(torch.is_tensor, pytree.tree_leaves(call(inputs))) for call in (model, run)), strict=True)
        return float(torch.stack([(one.double() - other.double()).abs().max() for one, other in pairs]).max())


def _torch(program: ExportedProgram) -> tuple[bytes, Run]:
    """Return a program as a file's content, and the program loaded from it."""
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue(), torch.export.load(io.BytesIO(content.getvalue())).module()


def _onnx(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[bytes, Run]:
    """Return a program in ONNX as a file's content, and the program loaded from it."""
    import onnxruntime  # an extra

    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=[{0: "batch"}, *[{}] * (len(inputs) - 1)],  # only for the name
    )
    assert converted is not None
    content = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(values: Any) -> list[Tensor]:
        arrays = map(np.ascontiguousarray, pytree.tree_leaves(values))
        return [torch.from_numpy(output) for output in session.run(None, dict(zip(inputs, arrays, strict=True)))]

    return content, run
