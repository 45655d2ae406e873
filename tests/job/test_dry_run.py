import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Data, Split
from mnist_ray.data.splits import splits_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.dry_run import notes_of_transforms, try_batch
from mnist_ray.workload.calls import data_of
from mnist_ray.workload.loading import load
from tests.conftest import mnist

Write = Callable[..., Path]
FP32 = TrainConfig(precision="fp32", num_epochs=2, lr_schedule="one-cycle")

RIGHT = """
import math
import numpy as np
import torch
from types import SimpleNamespace
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from mnist_ray.errors import JobError
from mnist_ray.workload import Arrays, Classification, Data, Metric, Regression, Workload

NAMES, ABC = ({"class_names": list(names)} for names in ("abcdefghij", "abc"))

def examples(number, *shape):
    return Arrays(np.ones((number, *(shape or (4,))), np.float32), np.arange(number) % 10)

def of_arrays(targets): return Arrays(np.ones((20, 4), "f"), targets)
def of_pairs(targets): return [*zip(np.ones((20, 4), "f"), targets)]

class Stream(torch.utils.data.IterableDataset): __iter__ = iter

class Right(Classification):
    def load_data(self):
        return Data(examples(20), examples(10))
    def create_model(self):
        return nn.Linear(4, self.num_classes)

class Numbers(Regression):
    def load_data(self):
        part = Arrays(np.ones((20, 4), np.float32), np.arange(20, dtype=np.float32))
        return Data(part, part)
    def create_model(self):
        return nn.Linear(4, 1)

class Formed(nn.Linear):
    def __init__(self, form, size=10):
        super().__init__(4, size)
        self.form = form
    def forward(self, inputs): return self.form(super().forward(inputs))

class Teaching(nn.Linear):
    def __init__(self):
        super().__init__(4, 10)
        self.teacher = nn.Parameter(self.weight.detach() / 2, requires_grad=False)
    def forward(self, inputs):
        self.teacher.data.lerp_(self.weight.data, 0.1)
        return super().forward(inputs)

class WithExtraState(nn.Linear):
    def get_extra_state(self): return {"calls": 3}
    def set_extra_state(self, state): ...

class WithFunction(lr_scheduler.ConstantLR):
    factor_of = staticmethod(lambda step: 1.0)
    def state_dict(self): return {"factor_of": self.factor_of}

class Wrapping(torch.optim.SGD):
    def state_dict(self): return {"wrapped": super().state_dict()}

class Exact(torch.optim.SGD):
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"momentum_buffer": parameter.detach().to(torch.complex128)}

class Spare(nn.Linear):
    def __init__(self, *names):
        super().__init__(4, 10)
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(3)))
"""


def tried(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> None:
    """Try ``Wrong``, a workload derived from ``base``."""
    workload = load(f"{write(f'{RIGHT}class Wrong({base}):{body}')}:Wrong")()
    try_batch(workload, splits_of(data_of(workload), 0).train, config, [config.batch_size], Fraction(1))


def message_of(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> str:
    """Return the error message of a wrong workload."""
    with pytest.raises(UsageError) as raised:
        tried(write, body, base, config)
    return str(raised.value)


# --- right workloads


@pytest.mark.parametrize("base", ["Right", "Numbers"])
def test_right_workloads_pass(write: Write, base: str) -> None:
    tried(write, " ...", base)


RARE = {
    "a frozen parameter": 'def create_model(self): model = Spare("a"); model.a.requires_grad = False; return model',
    "a prepare that returns another form and has one more argument": (
        "def create_model(self): return nn.Sequential(nn.Flatten(), nn.Linear(4, 10, dtype=torch.float64))\n"
        "    def prepare(self, inputs, generator, scale=1): return inputs.reshape(-1, 2, 2).double()"
    ),
    "fewer examples than a batch": "def load_data(self): return Data(examples(3), examples(3), metadata=NAMES)",
    "a list of pairs": "def load_data(self): return Data([(np.ones(4, 'f'), 3)] * 20, examples(3), metadata=NAMES)",
    "a loss of a batch": (
        "compares_examples = True\n    def loss(self, outputs, targets): return outputs.std(0).sum() + 0 * targets"
    ),
    "mixed examples": (
        "def batch_loss(self, model, batch, step):\n"
        "        outputs = model(torch.lerp(batch.inputs, batch.inputs.roll(1, 0), 0.3))\n"
        "        return 0.7 * self.loss(outputs, batch.targets) + 0.3 * self.loss(outputs, batch.targets.roll(1, 0))"
    ),
    "a teacher": "def create_model(self): return Teaching()",
    "noise": "def create_model(self): return Formed(lambda outputs: outputs + torch.randn(len(outputs), 10))",
    "no predictions": "def predictions(self, outputs, targets): return {}",
    "unsigned labels": (
        "def load_data(self): some = Arrays(np.ones((20, 4), 'f'), np.arange(20, dtype=np.uint16) % 10); "
        "return Data(some, some)"
    ),
    "details without a matrix": "def details(self, columns): return {'ones': int((columns['label'] == 1).sum())}",
}


@pytest.mark.parametrize("body", RARE.values(), ids=RARE)
def test_rare_but_right_workloads_pass(write: Write, body: str) -> None:
    tried(write, f"\n    {body}\n")


OWN_OUTPUTS = """
    def create_model(self): return Formed(lambda outputs: (outputs, outputs))
    def loss(self, outputs, targets): return F.cross_entropy(outputs[0], targets.long(), reduction="none")
    def measure(self, outputs, targets): return {"accuracy": outputs[0].argmax(1) == targets}
    def predictions(self, outputs, targets): return {}
"""


def test_outputs_are_a_workloads_own_matter_if_it_overrides_what_uses_them(write: Write) -> None:
    tried(write, OWN_OUTPUTS)
    some = OWN_OUTPUTS.replace("def predictions(", "def _unused(")
    assert message_of(write, some) == "Wrong: the model returns a tuple, not a tensor"


def test_a_regressions_outputs_are_its_own_matter_if_it_overrides_what_uses_them(write: Write) -> None:
    body = """
    def create_model(self): return nn.Linear(4, 3)
    def loss(self, outputs, targets): return outputs.sum(1) * targets
    def measure(self, outputs, targets): return {"rmse": targets, "mae": targets, "r2": targets}
    def summarize(self, means): return dict(means)
    def predictions(self, outputs, targets): return {}
"""
    tried(write, body, base="Numbers")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", ["StepLR(optimizer, 1)", "OneCycleLR(optimizer, 0.1, total_steps)"])
@pytest.mark.parametrize("num_steps", [1, 150])
def test_a_workloads_own_schedule_is_tried_with_the_runs_steps_without_a_warning(
    write: Write, schedule: str, num_steps: int
) -> None:
    body = f"""
    def create_scheduler(self, optimizer, config, total_steps):
        assert total_steps == {num_steps}, total_steps
        return lr_scheduler.{schedule}
"""
    tried(write, body, config=TrainConfig(precision="fp32", num_steps=num_steps))


@pytest.mark.parametrize(
    ("arguments", "is_validated", "message"),
    [
        ("patience=3", True, "has mode='min', but looks at accuracy; create it with mode='max'"),
        ('mode="max"', False, "looks at the validation, but there is none; leave --validation-size 0"),
    ],
)
def test_a_schedule_by_name_fits_the_validation(
    arguments: str, is_validated: bool, message: str, few_images: Arrays
) -> None:
    schedule = f"torch.optim.lr_scheduler.ReduceLROnPlateau({arguments})"
    config = TrainConfig(precision="fp32", lr_schedule=schedule)
    with pytest.raises(UsageError, match=f"^MNIST: ReduceLROnPlateau {message}"):
        try_batch(mnist(), Split(few_images), config, [32], Fraction(1), is_validated=is_validated)


# --- how much is tried


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-4, {1, 7, 8, 16}), (0.02, {1, 2, 4}), (0.1, {2})])
def test_the_slower_an_example_is_the_fewer_are_tried(
    seconds: float, sizes: set[int], few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = mnist()
    prepare = Mock(side_effect=workload.prepare)
    monkeypatch.setattr(workload, "prepare", prepare)
    monkeypatch.setattr("mnist_ray.job.dry_run.timeit", Mock(repeat=Mock(return_value=[9.0, seconds])))
    try_batch(workload, Split(few_images), FP32, [300], Fraction(1))
    assert {len(call.args[0]) for call in prepare.call_args_list} == sizes


NORMED = "def create_model(self): return nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10))"


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "part", "smallest"),
    [(19, None, 1, 1), (20, None, 1, None), (20, None, Fraction(1, 16), 1), (20, 1, 1, 1), (20, 2, 1, None)],
)
def test_the_smallest_part_of_a_batch_is_tried(
    write: Write, batch_size: int, micro_batch_size: int | None, part: Fraction, smallest: int | None
) -> None:
    config = TrainConfig(precision="fp32", batch_size=batch_size, micro_batch_size=micro_batch_size)
    workload = load(f"{write(f'{RIGHT}class Wrong(Right):{chr(10)}    {NORMED}{chr(10)}')}:Wrong")()
    train = splits_of(data_of(workload), 0).train
    if smallest is None:
        try_batch(workload, train, config, [batch_size], Fraction(part))
        return
    with pytest.raises(UsageError) as raised:
        try_batch(workload, train, config, [batch_size], Fraction(part))
    if micro_batch_size is None:
        message = str(raised.value)
        assert message.startswith("Wrong: a worker computes only 1 example of some batches at a time, too few for the")
        assert message.endswith(f"; choose a --batch-size other than {batch_size}")
    else:
        assert "Expected more than 1 value per channel" in str(raised.value)


class CountingReads(list[Any]):
    """Examples that count how often each is read."""

    def __init__(self) -> None:
        super().__init__((np.ones((28, 28), np.uint8), number % 10) for number in range(40))
        self.num_reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        return super().__getitem__(index)


def test_each_example_of_a_dataset_is_read_once() -> None:
    examples = CountingReads()
    try_batch(mnist(), Split(examples), FP32, [32], Fraction(1))
    assert examples.num_reads == 1 + 16 + 8  # one to see how slow they are; the few; the last batch


# --- mistakes


MISTAKES = [  # "[…]" stands for what depends on versions
    ("def create_model(self): ...",
     "Wrong.create_model returned NoneType, not a torch.nn.Module"),
    ("def create_model(self): return nn.LazyLinear(10)",
     "Wrong.create_model: a lazy layer has no shape yet; first call the model on an example"),
    ("def create_model(self): return WithExtraState(4, 10)",
     "Wrong.create_model: the state_dict holds _extra_state, of type dict; a checkpoint keeps only tensors: "
     "use a buffer or a setting"),
    ("def create_model(self): return nn.Linear(4, 10, dtype=torch.complex128)",
     "a checkpoint cannot hold weight (complex128, strided); use another type, or persistent=False"),
    ("def create_model(self): model = Spare('mask'); model.mask.data[:] = -torch.inf; return model",
     "Wrong.create_model: the parameter mask is not finite; if it is a mask, make it a buffer"),
    ("def create_model(self): return Spare('first', 'second', 'third')",
     "Wrong: the parameter first is not part of the loss, nor 2 others; remove or freeze them; if other steps use "
     "them, set has_unused_parameters = True"),
    ("def create_model(self): scale = torch.rand(10); return Formed(lambda outputs: outputs * scale)",
     "Wrong: another new model computes something else with the same state_dict; make random tensors buffers, "
     "and keep layers in an nn.ModuleList"),
    ("def create_model(self): return nn.Linear(4, 20)",
     "Wrong: the model returns 20 logits per example, but the data have 10 classes"),
    ("def create_model(self): return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))",
     "Wrong: the model returns no logits per example, but the data have 10 classes"),
    ("def create_model(self): return Formed(lambda outputs: SimpleNamespace(logits=outputs))",
     "Wrong: the model returns a SimpleNamespace, not a tensor"),
    ("def create_model(self): return Formed(lambda outputs: outputs @ torch.ones(7, 10))",
     "Wrong, the model: RuntimeError: […]mat1 and mat2 shapes cannot be multiplied (1x10 and 7x10) (problem.py, "
     "line 71)"),
    ("def create_model(self): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(7, 10))",
     "Wrong, the model, in 2 (Linear): RuntimeError: […]mat1 and mat2 shapes cannot be multiplied (1x8 and 7x10) "
     "(step.py[…]"),
    ("def prepare(self, inputs, generator): return inputs.double()",
     "Wrong, the model: RuntimeError: mat1 and mat2 must have the same dtype, but got Double and Float "
     "(step.py[…]; return inputs.float() from prepare"),
    ("def prepare(self, inputs, generator): return inputs.byte()",
     "Wrong, the model: RuntimeError: mat1 and mat2 must have the same dtype, but got Byte and Float "
     "(step.py[…]; return inputs.float() from prepare"),
    ("def create_model(self): return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 10))\n"
     "    def prepare(self, inputs, generator): return inputs.double()",
     "Wrong, the model, in 0 (BatchNorm1d): RuntimeError: mixed dtype (CPU): all inputs must share same "
     "datatype (step.py[…]; return inputs.float() from prepare"),
    ("def create_model(self): return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 10))\n"
     "    def prepare(self, inputs, generator): return inputs.byte()",
     "Wrong, the model, in 0 (BatchNorm1d): NotImplementedError: \"batch_norm\" not implemented for 'Byte' "
     "(step.py[…]; return inputs.float() from prepare"),
    ("def loss(self, outputs, targets): return F.cross_entropy(outputs, targets)",
     'Wrong.loss must be one number per example, (16,) here, not (); use reduction="none", and 0 for examples '
     "that do not count, also in weights()"),
    ("def loss(self, outputs, targets): return super().loss(outputs, targets) / (targets - 1)",
     "Wrong.loss is not finite on 16 examples with the initial weights"),
    ("def loss(self, outputs, targets): return super().loss(outputs.detach(), targets)",
     "Wrong.batch_loss does not depend on the model's parameters: nothing would be learned"),
    ("def loss(self, outputs, targets): return outputs.sum(1) + (targets[:, None] == targets).sum(1)",
     "Wrong: an example's loss changes if other examples leave the batch, so it depends on the number of "
     "workers; mask the padding, compute it in summarize_predictions, or set compares_examples = True if intended"),
    ("def weights(self, targets): return 1.0 * targets",
     "Wrong has weights, so it needs a loss that multiplies by them; return super().loss(outputs, targets) * "
     "self.weights(targets)"),
    ("def weights(self, targets): return -torch.ones(len(targets))",
     "Wrong.weights must be finite numbers from 0, not all of them 0"),
    ("def weights(self, targets): return torch.zeros(len(targets))",
     "Wrong.weights must be finite numbers from 0, not all of them 0"),
    ("def weights(self, targets): return torch.ones(len(targets), 2)\n"
     "    def loss(self, outputs, targets): return outputs.sum(1)",
     'Wrong.weights must be one number per example, (16,) here, not (16, 2); use reduction="none", and 0 for '
     "examples that do not count, also in weights()"),
    ("def measure(self, outputs, targets): ...",
     "Wrong.measure returned NoneType, not a dict"),
    ("def measure(self, outputs, targets): return {'accuracy': 0.5}",
     'Wrong.measure: accuracy must be one number per example, (16,) here, not float; use reduction="none", '
     "and 0 for examples that do not count, also in weights()"),
    ("def measure(self, outputs, targets): return {'loss': targets}",
     "Wrong.measure: loss has another meaning; choose another name"),
    ("def measure(self, outputs, targets): return {'accuracy': (targets / 9).std().expand(len(targets))}",
     "Wrong: an example's accuracy changes if other examples leave the batch, so it depends on the number of "
     "workers; mask the padding, compute it in summarize_predictions, or set compares_examples = True if intended"),
    ("def predictions(self, outputs, targets): ...",
     "Wrong.predictions returned NoneType, not a dict"),
    ("def predictions(self, outputs, targets): return {'label': targets, 'weight': targets}",
     "Wrong.predictions: weight has another meaning; choose another name"),
    ("def predictions(self, outputs, targets): return {'label': targets, 'logits': outputs.T}",
     "Wrong.predictions: logits must be a tensor with 16 examples, (N, ...)"),
    ("def predictions(self, outputs, targets): return {'words': outputs[:, : 3 + int(targets[0])]}",
     "predictions: words differs in shape between examples, (3,) and […]; pad them to one"),
    ("def summarize(self, means): ...",
     "Wrong.summarize returned NoneType, not a dict"),
    ("def summarize(self, means): return {}",
     "Wrong.summarize and summarize_predictions return nothing, but Wrong.metrics names accuracy"),
    ("def summarize(self, means): return {'accuracy': 'high'}",
     "Wrong: metric accuracy is 'high', not a number"),
    ("def summarize_predictions(self, columns): ...",
     "Wrong.summarize_predictions returned NoneType, not a dict"),
    ("def summarize_predictions(self, columns): return {'auc': 1.0}",
     "Wrong.summarize and summarize_predictions return accuracy, auc, but Wrong.metrics names accuracy"),
    ("metrics = ()",
     "Wrong.summarize and summarize_predictions return accuracy, but Wrong.metrics names none"),
    ("def details(self, columns): return columns",
     "Wrong, details: TypeError: Object of type ndarray is not JSON serializable (dry_run.py[…]"),
    ("def lines(self, columns): 1 / 0",
     "Wrong, lines: ZeroDivisionError: division by zero (problem.py, line 71)"),
    ("def collate(self, examples): return torch.ones(len(examples), 4), [0] * len(examples)\n"
     "    def load_data(self): return Data([(np.ones(4, 'f'), 3)] * 20, examples(3), metadata=NAMES)",
     "Wrong: a batch's targets are a list; return torch.tensor(targets) from collate, or numbers from the "
     "Dataset"),
    ("def collate(self, examples): return torch.ones(len(examples), 4)\n"
     "    def load_data(self): return Data([(np.ones(4, 'f'), 3)] * 20, examples(3), metadata=NAMES)",
     "Wrong, an example: collate must return a pair (inputs, targets)"),
    ("def load_data(self): return Data([(np.ones(4, 'f'), 3, 4)] * 20, examples(3), metadata=NAMES)",
     "train: a Dataset's items must be pairs (input, target), not 3 values; either may be a tuple or a dict; "
     "if there are no targets, repeat the input"),
    ("def load_data(self): return Data([(np.ones(4 + row // 10, 'f'), 3) for row in range(20)], examples(3), "
     "metadata=NAMES)",
     "Wrong, an example: train examples do not fit together: example 12 has shapes ((5,), ()), example 0 has "
     "((4,), ()); make them alike in the Dataset, or join them in the workload's collate()"),
    ("def load_data(self): return Data([(np.ones(4, 'f'), row) for row in range(20)], examples(3), "
     "metadata=NAMES)",
     "Wrong has target 12 in row 8, but the classes are 0 to 9"),
    ("def as_picture(self, inputs): return inputs",
     "Wrong.as_picture must return uint8 (H, W) or (H, W, 3), not float32 (4,)"),
    ("callbacks = [5]",
     "Wrong.callbacks must hold Callback objects, not 5"),
    ("def create_optimizer(self, model, config): return [torch.optim.SGD(model.parameters())] * 2",
     "Wrong.create_optimizer must return a torch.optim.Optimizer, or a dict of them by name, not list"),
    ("def create_optimizer(self, model, *_): return Wrapping(model.parameters())",
     "Wrong, a checkpoint of optimizer and schedule: KeyError: 'state' (checkpoint.py[…]"),
    ("def create_optimizer(self, model, *_): return Exact(model.parameters())",
     "a checkpoint cannot hold 0.momentum_buffer (complex128, strided); use another type, or persistent=False"),
    ("def create_optimizer(self, model, *_): return torch.optim.LBFGS(model.parameters())",
     "Wrong, training_step: TypeError: LBFGS.step() missing 1 required positional argument: 'closure' "
     "(step.py[…]; override training_step: step.update(closure=lambda: step.backward(self.batch_loss))"),
    ("def create_scheduler(self, optimizer, *_): return WithFunction(optimizer)",
     "Wrong: a state_dict of optimizer or schedule has more than numbers, strings, lists, dicts and tensors"),
    ("def create_scheduler(self, optimizer, *_): return lr_scheduler.ReduceLROnPlateau(optimizer)",
     "Wrong: ReduceLROnPlateau has mode='min', but looks at accuracy; create it with mode='max'"),
    ("def training_step(self, step): step.update()",
     "Wrong.training_step must call step.backward"),
    ("def training_step(self, step): step.backward(self.batch_loss, optimizer='last')",
     "Wrong.training_step: there is no optimizer 'last'; name one of "),
    ("def training_step(self, step): step.backward(lambda model, batch, step: model(batch.inputs).sum())",
     'Wrong.<lambda> must be one number per example, (16,) here, not (); use reduction="none", and 0 for '
     "examples that do not count, also in weights()"),
    ("def training_step(self, step): step.backward(lambda model, batch, step: torch.zeros(len(batch.targets)))",
     "Wrong.<lambda> does not depend on the model's parameters: nothing would be learned"),
    ("def training_step(self, step): super().training_step(step); step.log('epoch', 1.0)",
     "Wrong: 'epoch' cannot be logged; choose another name"),
    ("def batch_loss(self, model, batch, step): self.kept = getattr(self, 'kept', 0) + model(batch.inputs)[:, "
     "0]; return self.kept",
     "Wrong, training_step: RuntimeError: Trying to backward through the graph a second time[…]"),
    ("compares_examples = True\n"
     "    def create_model(self): return Formed(lambda outputs: torch.cat([outputs, outputs]))\n"
     "    def check_outputs(self, outputs, targets): ...\n"
     "    def predictions(self, outputs, targets): return {}\n"
     '    def measure(self, outputs, targets): return {"accuracy": 0 * targets}\n'
     "    def loss(self, outputs, targets): return outputs.sum() + 0 * targets",
     "Wrong: an output is (32, 10) for 16 examples and (16, 10) for 8; with compares_examples, return a row "
     "per example, such as its views (N, 2, …), or one number"),
    ("compares_examples = True\n"
     "    def create_model(self): return Formed(lambda outputs: outputs @ outputs.T)\n"
     "    def check_outputs(self, outputs, targets): ...\n"
     "    def predictions(self, outputs, targets): return {}\n"
     '    def measure(self, outputs, targets): return {"accuracy": 0 * targets}\n'
     "    def loss(self, outputs, targets): return outputs.sum() + 0 * targets",
     "Wrong: an output is (16, 16) for 16 examples and (8, 8) for 8; with compares_examples, return a row per "
     "example, such as its views (N, 2, …), or one number"),
    ("compares_examples = True\n"
     "    def create_model(self): return Formed(lambda outputs: outputs.mean(0))\n"
     "    def check_outputs(self, outputs, targets): ...\n"
     "    def predictions(self, outputs, targets): return {}\n"
     '    def measure(self, outputs, targets): return {"accuracy": 0 * targets}\n'
     "    def loss(self, outputs, targets): return outputs.sum() + 0 * targets",
     "Wrong: an output is (10,) for 16 examples and (10,) for 8; with compares_examples, return a row per "
     "example, such as its views (N, 2, …), or one number"),
    ("def load_data(self): part = of_arrays(np.arange(20)); return Data(part, part, metadata=ABC)",
     "Wrong.load_data: train has target 3 in row 3, but the classes are 0 to 2"),
    ("def load_data(self): part = of_pairs(np.arange(20)); return Data(part, part, metadata=ABC)",
     "Wrong has target 3 in row 3, but the classes are 0 to 2"),
    ("def load_data(self): part = of_arrays(np.full(20, -1)); return Data(part, part, metadata=ABC)",
     "Wrong.load_data: train has target -1 in row 0, but the classes are 0 to 2"),
    ("def load_data(self): part = of_pairs(np.full(20, -1)); return Data(part, part, metadata=ABC)",
     "Wrong has target -1 in row 0, but the classes are 0 to 2"),
    ("def load_data(self): part = of_arrays(np.zeros((20, 1), np.int64)); return Data(part, part, metadata=ABC)",
     "Wrong.load_data: train: targets must be integers (N,), not int64 (20, 1)"),
    ("def load_data(self): part = of_pairs(np.zeros((20, 1), np.int64)); return Data(part, part, metadata=ABC)",
     "Wrong: targets must be integers (N,), not int64 (16, 1)"),
    ("def load_data(self): part = of_arrays(np.zeros(20, np.float32)); return Data(part, part, metadata=ABC)",
     "Wrong.load_data: train: targets must be integers (N,), not float32 (20,)"),
    ("def load_data(self): part = of_pairs(np.zeros(20, np.float32)); return Data(part, part, metadata=ABC)",
     "Wrong: targets must be integers (N,), not float32 (16,)"),
    ("def batch_loss(self, model, batch): ...",
     "Wrong.batch_loss must take (self, model, batch, step) (problem.py, line 71)"),
    ("def pictures(self, result, test): ...",
     "Wrong.pictures must take (self, result, test, columns) (problem.py, line 71)"),
    ("def load_data(self): raise ValueError('oops')",
     "Wrong, load_data: ValueError: oops (problem.py, line 71)"),
    ("def metadata_of(self, data): raise ValueError('oops')",
     "Wrong, metadata_of: ValueError: oops (problem.py, line 71)"),
    ("def batch_loss(self, model, batch, step): raise ValueError('oops')",
     "Wrong, batch_loss: ValueError: oops (problem.py, line 71)"),
    ("def training_step(self, step): raise ValueError('oops')",
     "Wrong, training_step: ValueError: oops (problem.py, line 71)"),
    ("def create_model(self): raise ValueError('oops')",
     "Wrong, create_model: ValueError: oops (problem.py, line 71)"),
    ("def prepare(self, inputs, generator): raise ValueError('oops')",
     "Wrong, prepare: ValueError: oops (problem.py, line 71)"),
    ("def check_outputs(self, outputs, targets): raise ValueError('oops')",
     "Wrong, check_outputs: ValueError: oops (problem.py, line 71)"),
    ("def loss(self, outputs, targets): raise ValueError('oops')",
     "Wrong, loss: ValueError: oops (problem.py, line 71)"),
    ("def measure(self, outputs, targets): raise ValueError('oops')",
     "Wrong, measure: ValueError: oops (problem.py, line 71)"),
    ("def summarize(self, means): raise ValueError('oops')",
     "Wrong, summarize: ValueError: oops (problem.py, line 71)"),
    ("def summarize_predictions(self, columns): raise ValueError('oops')",
     "Wrong, summarize_predictions: ValueError: oops (problem.py, line 71)"),
    ("def predictions(self, outputs, targets): raise ValueError('oops')",
     "Wrong, predictions: ValueError: oops (problem.py, line 71)"),
    ("def create_optimizer(self, model, config): raise ValueError('oops')",
     "Wrong, create_optimizer: ValueError: oops (problem.py, line 71)"),
    ("def create_scheduler(self, optimizer, config, total_steps): raise ValueError('oops')",
     "Wrong, create_scheduler: ValueError: oops (problem.py, line 71)"),
    ("def weights(self, targets): raise ValueError('oops')",
     "Wrong, weights: ValueError: oops (problem.py, line 71)"),
    ("def as_picture(self, inputs): raise ValueError('oops')",
     "Wrong, as_picture: ValueError: oops (problem.py, line 71)"),
    ("def check_data(self, data): raise ValueError('oops')",
     "Wrong, check_data: ValueError: oops (problem.py, line 71)"),
    ("def load_data(self): return None",
     "Wrong.load_data returned NoneType, not mnist_ray.workload.Data"),
    ("def load_data(self): return Data(examples(3), 5)",
     "Wrong.load_data: test is of type int, neither Arrays(inputs, targets) nor a Dataset with a length"),
    ("def load_data(self): return Data(examples(3), validation={'a b': examples(3)})",
     "Wrong.load_data: validation: name each set with letters, digits and _"),
    ("def load_data(self): return Data(examples(3), validation={})",
     "Wrong.load_data: validation: name each set with letters, digits and _"),
    ("def load_data(self): return Data(examples(3), validation={1: examples(3)})",
     "Wrong.load_data: validation: name each set with letters, digits and _"),
    ("def load_data(self): return Data(examples(3), validation={'clean': None})",
     "Wrong.load_data: validation clean is of type NoneType, neither Arrays(inputs, targets) nor a Dataset with a"
     " length"),
    ("def load_data(self): return Data(examples(3), validation={'clean': examples(3), 'few': examples(0)})",
     "Wrong.load_data: validation few holds no examples"),
    ("def load_data(self): return Data(examples(3), Stream())",
     "Wrong.load_data: test is a stream without a length; only the training data may be one"),
    ("def load_data(self): return Data(iter([]), examples(3))",
     "Wrong.load_data: train is an iterator, which can be read once; give the function that makes it"),
    ("def load_data(self): return Data(examples(0), examples(3))",
     "Wrong.load_data: train holds no examples"),
    ("def load_data(self): return Data(examples(3), Arrays(np.ones((1200, 4)), np.arange(1199)))",
     "Wrong.load_data: test has 1,200 inputs but 1,199 targets"),
    ("def load_data(self): return Data(Arrays(torch.ones(3, 4), np.arange(3)), examples(3))",
     "Wrong.load_data: train: inputs must be a NumPy array (N, ...), not Tensor; call .numpy()"),
    ("def load_data(self): return Data(examples(3), Arrays({'x': [1, 2, 3]}, np.ones(3)))",
     'Wrong.load_data: test: inputs["x"] must be a NumPy array (N, ...), not list'),
    ("def load_data(self): return Data(Arrays(np.ones(3), None), examples(3))",
     "Wrong.load_data: train: targets must be a NumPy array (N, ...), not NoneType; without targets, repeat the "
     "inputs"),
    ("def load_data(self): return Data(Arrays(np.ma.ones((3, 4)), np.arange(3)), examples(3))",
     "Wrong.load_data: train: inputs are a masked array, whose mask would be ignored; call .filled(VALUE)"),
    ("def load_data(self): return Data(Arrays(np.array(3.0), np.array(3)), examples(3))",
     "Wrong.load_data: train: inputs must be a NumPy array (N, ...), not ndarray"),
    ("def load_data(self): return Data(examples(3), Arrays(np.ones((2, 4)), np.array(['a', 'b'])))",
     "Wrong.load_data: test: targets must be numbers, not of dtype <U1"),
    ("def load_data(self): return Data(examples(20), examples(20), metadata={'mean': np.float32(1)})",
     "Wrong, metadata_of: TypeError: Object of type float32 is not JSON serializable (calls.py[…]"),
    ("def load_data(self): return Data(examples(20), examples(20), metadata={'mean': np.ones(3)})",
     "Wrong, metadata_of: TypeError: Object of type ndarray is not JSON serializable (calls.py[…]"),
    ("def load_data(self): return Data(examples(20), examples(20), metadata={'mean': {1, 2}})",
     "Wrong, metadata_of: TypeError: Object of type set is not JSON serializable (calls.py[…]"),
    ("def load_data(self): return Data(examples(20), examples(20), metadata={'mean': math.nan})",
     "Wrong, metadata_of: ValueError: Out of range float values are not JSON compliant[…]"),
    ("def load_data(self): return Data(examples(3), examples(3), files=['/gone.jpg'])",
     "Wrong, load_data: FileNotFoundError: […]'/gone.jpg'[…]"),
]  # fmt: skip
OF_NUMBERS = [
    ("def create_model(self): return nn.Linear(4, 3)",
     "Wrong: the model returns (16, 3) for targets (16,); both must be one number per example"),
    ("def load_data(self): part = of_arrays(np.ones((20, 1), 'f')); return Data(part, "
     "part)",
     "Wrong: the model returns (16, 1) for targets (16, 1); both must be one number per example"),
    ("def create_model(self): return Formed(lambda outputs: (outputs, outputs), 1)",
     "Wrong: the model returns a tuple, not a tensor"),
    ("def create_model(self): return Formed(torch.squeeze, 1)",
     "Wrong, loss: TypeError: len() of a 0-d tensor (regression.py[…]"),
]  # fmt: skip


def assert_is(message: str, line: str) -> None:
    """Assert that a message is a line of the table, where […] stands for any text."""
    pattern = ".*".join(map(re.escape, line.split("[…]")))
    assert re.fullmatch(pattern, message), f"{message!r} is not {line!r}"


@pytest.mark.parametrize(("body", "line"), MISTAKES)
def test_a_mistake_is_one_line(write: Write, body: str, line: str) -> None:
    assert_is(message_of(write, f"\n    {body}\n"), line)


@pytest.mark.parametrize(("body", "line"), OF_NUMBERS)
def test_a_mistake_in_a_regression_is_one_line(write: Write, body: str, line: str) -> None:
    assert_is(message_of(write, f"\n    {body}\n", "Numbers"), line)


SUMMED = """
    def create_model(self): return Summed(4, 10)
    def prepare(self, inputs, generator): return {"inputs": inputs}

class Summed(nn.Linear):
    def forward(self, taken):
        features = super().forward(taken["inputs"])
        return torch.zeros(features.shape).index_add(0, torch.arange(len(features)), features)
"""
CLOSED = """
    def create_optimizer(self, model, config): return torch.optim.LBFGS(model.parameters())
    def training_step(self, step): step.update(closure=lambda: step.backward(self.batch_loss))
"""


def test_the_model_is_tried_in_the_precision_of_the_training(write: Write) -> None:
    said = message_of(write, SUMMED, config=TrainConfig(precision="bf16"))
    assert said.startswith("Wrong, the model: RuntimeError: ")
    assert said.endswith("; create one of the tensors with the other's new_zeros(…), or use --precision fp32")
    tried(write, CLOSED)
    said = message_of(write, CLOSED, config=TrainConfig(precision="fp16"))
    assert said == "--precision fp16 does not work with a closure in step.update"


@pytest.mark.parametrize("error", [JobError, UsageError])
def test_an_error_in_one_line_is_raised_unchanged(write: Write, error: type[Exception]) -> None:
    line = f"from mnist_ray.errors import {error.__name__}; raise {error.__name__}('the file is damaged')"
    with pytest.raises(error, match=r"^the file is damaged$"):
        tried(write, f"\n    def load_data(self): {line}\n")


class Turned(torch.utils.data.Dataset[Any]):
    """Examples whose inputs a random transform changes, or those of one without it."""

    def __init__(self, *, is_random: bool) -> None:
        self.is_random = is_random

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), -1.0 if self.is_random and random.random() < 0.5 else 1.0), index % 10


@pytest.mark.parametrize("is_random", [True, False])
def test_a_note_says_that_the_held_out_validation_set_gets_random_transforms(is_random: bool) -> None:
    data, own = Turned(is_random=is_random), Turned(is_random=True)
    held_out, given = (splits_of(Data(data, data, validation), None).validation for validation in (None, own))
    assert ["validation gets them, too" in note for note in notes_of_transforms(mnist(), held_out)] == [
        True
    ] * is_random
    assert notes_of_transforms(mnist(), given) == []
