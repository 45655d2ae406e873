from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnist_ray.data.tensors import as_fp32, detached, map_tensors

Pair = namedtuple("Pair", ["first", "second"])


@dataclass(frozen=True)
class Outputs:
    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)


class Named(dict):
    """Whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


HALF = torch.ones(2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("held", "tensor_in"),
    [
        ({"a": {"b": HALF}}, lambda outputs: outputs["a"]["b"]),
        (OrderedDict(a=HALF), lambda outputs: outputs["a"]),
        (Counter({"a": HALF}), lambda outputs: outputs["a"]),
        (Named(a=HALF), lambda outputs: outputs.a),
        ((3, (HALF,)), lambda outputs: outputs[1][0]),
        (Pair(HALF, "text"), lambda outputs: outputs.first),
        (Outputs(HALF), lambda outputs: outputs.logits),
        (Outputs(torch.ones(1), [HALF]), lambda outputs: outputs.hidden[0]),
        (nn.utils.rnn.pack_sequence([HALF]), lambda outputs: outputs.data),
    ],
)
def test_outputs_of_any_nesting_become_fp32_in_what_held_them(held: Any, tensor_in: Any) -> None:
    outputs = as_fp32(held)
    assert type(outputs) is type(held)
    assert tensor_in(outputs).dtype is torch.float32
    assert tensor_in(held).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.int64, torch.int64), (torch.bool, torch.bool), (torch.float64, torch.float32)]
)
def test_outputs_that_are_no_fractions_keep_their_type(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert as_fp32([torch.ones(2, dtype=dtype)])[0].dtype is expected


@pytest.mark.parametrize("value", ["text", None, 3, Outputs, range(3)])
def test_what_holds_no_tensors_stays_as_it_is(value: Any) -> None:
    assert map_tensors(torch.neg, value) is value


def test_detached_outputs_keep_no_graph() -> None:
    made = nn.Linear(2, 2)(torch.ones(1, 2))
    assert detached({"a": made})["a"].grad_fn is None
    assert made.grad_fn is not None
