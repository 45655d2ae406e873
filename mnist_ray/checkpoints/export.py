"""Writes a trained model as a program of ``torch.export``, and its weights: ``mnist-ray export`` after flag parsing."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
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
from mnist_ray.storage import write_file
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import data_of, placed

_TOLERANCE = 1e-4
_NUM_COMPARED = 512
_BATCH_SIZES = (16, 2, 2, 2, 2)  # several show which sizes vary, such as the length of texts


def export(found: Found, config: ExportConfig) -> Path:
    """Write a checkpoint's model as a program, after comparing the outputs of both; return the program's path.

    Also write the weights, to a file of the same name that ends in ``.safetensors``.

    Raises UsageError, also if PyTorch cannot export the model, and JobError.
    """
    path, workload, model = path_of(config.output, "--output"), found.workload, found.load_model()
    batches, part = batches_of(workload)
    examples = [inputs_of(workload, batches, 3 * number, size) for number, size in enumerate(_BATCH_SIZES)]
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(examples)):
        remedy = "to be exported, a model must take tensors, alone or in dicts, lists and tuples"
        raise UsageError(f"{type(workload).__name__}: {remedy}")
    number, content = min(_NUM_COMPARED, len(batches)), io.BytesIO()
    with _explained(workload):
        sizes = pytree.tree_map(_sizes, *examples)
        free = pytree.tree_map(lambda size: Dim.AUTO if isinstance(size, str) else size, sizes)
        torch.export.save(torch.export.export(model, (examples[0],), dynamic_shapes=(free,)), content)
        program = torch.export.load(io.BytesIO(content.getvalue())).module()
        outputs = [program(example) for example in examples]
        difference = largest_difference(model, program, inputs_of(workload, batches, 0, number))
    if not difference <= _TOLERANCE:  # also true for NaN
        raise JobError(f"the program does not match the checkpoint: outputs differ by up to {difference:.1e}")
    write_file(path, content.getvalue())
    weights = path.with_suffix(".safetensors")
    write_file(weights, save({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}))
    for note in found.notes:
        say(f"note       {note}")
    say(f"checkpoint {found.checkpoint.path}")
    say(f"program    {path}: {_described(workload.nouns, examples)} to {_described('outputs', outputs)}")
    say(f"weights    {weights}")
    say(f"checked    on {number:,} {part} {workload.nouns}: outputs differ by at most {difference:.1e}")
    return path


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


def largest_difference(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> float:
    """Return the largest difference between the outputs of two models; NaN if an output is NaN."""
    with torch.inference_mode():
        pairs = zip(*(filter(torch.is_tensor, pytree.tree_leaves(call(inputs))) for call in (model, run)), strict=True)
        both = [(ours.double(), other.double()) for ours, other in pairs]
        apart = [torch.where(ours == other, 0.0, ours - other).abs().max() for ours, other in both]  # both may be -inf
        return float(torch.stack(apart).max())
