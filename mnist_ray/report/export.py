"""Writes a trained model as a program, or its weights, for use without this package: ``mnist-ray export``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from mnist_ray.checkpoints.find import Found
from mnist_ray.config import ExportConfig
from mnist_ray.data.batches import Batches
from mnist_ray.data.data import Split
from mnist_ray.data.sampler import Request
from mnist_ray.errors import JobError, UsageError, with_place
from mnist_ray.output import say
from mnist_ray.settings import path_of
from mnist_ray.storage import in_one_line, write_file
from mnist_ray.workload import user_code
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, placed

Run = Callable[[Any], Any]  # takes a model's inputs, and returns its outputs
_TOLERANCE = 1e-4
_NUM_COMPARED = 512
_BATCH_SIZES = (16, 2, 2, 2, 2)  # several show which sizes vary, such as the length of texts


def export(found: Found, config: ExportConfig) -> Path:
    """Write a checkpoint's model, after comparing the outputs of what is written with its own; return the file's path.

    A model with ``save_pretrained`` is also saved by it, into a folder beside the file.

    Raises UsageError, also if PyTorch cannot export the model, and JobError.
    """
    path, written_as = _target_of(config)
    workload, model = found.workload, found.load_model()
    batches, part = batches_of(workload)
    examples = [inputs_of(workload, batches, 3 * number, size) for number, size in enumerate(_BATCH_SIZES)]
    number = min(_NUM_COMPARED, len(batches))
    with _explained(workload):
        content, run = _WRITERS[written_as](workload, model, examples)
        outputs = [run(example) for example in examples]
        difference = largest_difference(model, run, inputs_of(workload, batches, 0, number))
    if not difference <= _TOLERANCE:  # also true for NaN
        raise JobError(f"the program does not match the checkpoint: outputs differ by up to {difference:.1e}")
    write_file(path, content)
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    about = f"{_described(workload.nouns, examples)} to {_described('outputs', outputs)}"
    say(f"{'weights' if written_as == 'safetensors' else 'program':<10} {path}: {about}")
    if hasattr(model, "save_pretrained"):
        with in_one_line(f"cannot write {path.with_suffix('')}"):
            model.save_pretrained(path.with_suffix(""))
        say(f"pretrained {path.with_suffix('')}/: for {type(model).__name__}.from_pretrained")
    say(f"checked    on {number:,} {part} {workload.nouns}: outputs differ by at most {difference:.1e}")
    return path


def _target_of(config: ExportConfig) -> tuple[Path, str]:
    """Return the file to write and its format. Raises UsageError if they do not fit."""
    ending = Path(config.output or "").suffix.removeprefix(".")
    written_as = config.format or (ending if config.output else "pt2")
    path = path_of(config.output or f"model.{written_as}", "--output")
    if written_as not in _WRITERS or path.suffix != f".{written_as}":
        raise UsageError(f"--output {config.output} must end in {f'.{config.format}' if config.format else _ENDINGS}")
    return path, written_as


def _as_program(workload: Workload, model: nn.Module, examples: Sequence[Any]) -> tuple[bytes, Run]:
    """Return a program of ``torch.export`` as bytes, and as a function."""
    content = io.BytesIO()
    torch.export.save(_traced(workload, model, examples), content)
    return content.getvalue(), torch.export.load(io.BytesIO(content.getvalue())).module()


def _as_onnx(workload: Workload, model: nn.Module, examples: Sequence[Any]) -> tuple[bytes, Run]:
    """Return a program for ONNX as bytes, and as a function that runs it in ONNX Runtime."""
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise UsageError(f"--format onnx needs {missing[0]}", fix="pip install 'mnist_ray[onnx]'")
    program = torch.onnx.export(_traced(workload, model, examples), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString(), program


def _as_weights(workload: Workload, model: nn.Module, examples: Sequence[Any]) -> tuple[bytes, Run]:
    """Return the weights as the content of a safetensors file, and another model that has loaded them."""
    content = save({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()})
    with user_code.alone:
        other = workload.create_model()
    other.load_state_dict(load(content))
    return content, other.eval()


_WRITERS = {"pt2": _as_program, "onnx": _as_onnx, "safetensors": _as_weights}
_ENDINGS = ", ".join(f".{name}" for name in _WRITERS)


def _traced(workload: Workload, model: nn.Module, examples: Sequence[Any]) -> torch.export.ExportedProgram:
    """Return the model's graph for batches of any size. Raises UsageError for inputs that are not tensors."""
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(examples)):
        remedy = "to be exported, a model must take tensors, alone or in dicts, lists and tuples"
        raise UsageError(f"{type(workload).__name__}: {remedy}")
    sizes = pytree.tree_map(_sizes, *examples)
    free = pytree.tree_map(lambda size: Dim.AUTO if isinstance(size, str) else size, sizes)
    return torch.export.export(model, (examples[0],), dynamic_shapes=(free,))


def batches_of(workload: Workload) -> tuple[Batches, str]:
    """Return the batches of the workload's test set or, without one, of its training set, and the set's name.

    Raises UsageError and JobError.
    """
    data = data_of(workload)
    examples, part = (Split(data.train), "training") if data.test is None else (Split(data.test, origin="test"), "test")
    return Batches(examples.transformed(data.transform), torch.device("cpu"), workload.collate), part


def inputs_of(workload: Workload, batches: Batches, start: int, number: int) -> Any:
    """Return the model's inputs for a batch of examples; too few examples are repeated. Raises UsageError."""
    places = np.arange(start, start + number) % len(batches)
    with placed(workload, "prepare"):
        return workload.prepare(batches[Request(places)].inputs, None)


@contextlib.contextmanager
def _explained(workload: Workload) -> Iterator[None]:
    """Turn PyTorch's errors into a one-line UsageError, and silence PyTorch's own output."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable()
            yield
    except UsageError:
        raise
    except Exception as error:
        said = f"{with_place(error, fallback=workload.source.folder)}; see docs/guides/runs.md#export"
        raise UsageError(f"{type(workload).__name__}: PyTorch cannot export the model: {said}") from error
    finally:
        logging.disable(logging.NOTSET)


def _sizes(*tensors: Tensor) -> list[int | str]:
    """Return a tensor's sizes in some batches: ``N`` for the batch size, a number if constant, else ``any``."""
    sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
    return ["N" if same == _BATCH_SIZES else same[0] if len(set(same)) == 1 else "any" for same in sizes]


def _described(noun: str, batches: Sequence[Any]) -> str:
    """Return the keys, sizes and dtypes of the tensors in a model's inputs or outputs for some batches."""
    found = []
    for (place, tensor), *others in zip(*(pytree.tree_flatten_with_path(batch)[0] for batch in batches), strict=True):
        if isinstance(tensor, Tensor):
            sizes = ", ".join(map(str, _sizes(tensor, *(other for _, other in others))))
            found.append(f"{noun}{pytree.keystr(place)} ({sizes}) {str(tensor.dtype).removeprefix('torch.')}")
    return ", ".join(found)


def largest_difference(model: nn.Module, run: Run, inputs: Any) -> float:
    """Return the largest difference between the outputs of two models; NaN if an output is NaN."""
    with torch.inference_mode():
        pairs = zip(*(filter(torch.is_tensor, pytree.tree_leaves(call(inputs))) for call in (model, run)), strict=True)
        both = [(ours.double(), other.double()) for ours, other in pairs]
        apart = [torch.where(ours == other, 0.0, ours - other).abs().max() for ours, other in both]  # both may be -inf
        return float(torch.stack(apart).max())
