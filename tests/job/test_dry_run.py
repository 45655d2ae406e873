import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.data.batches import Batches
from mnist_ray.data.data import Arrays, Data, Split
from mnist_ray.data.sampler import Request
from mnist_ray.data.splits import splits_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.dry_run import NUM_EXAMPLES, check_batch, new_model, note_of_transforms, try_batch
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

NAMES = {"class_names": list("abcdefghij")}

def examples(number, *shape):
    return Arrays(np.ones((number, *(shape or (4,))), np.float32), np.arange(number) % 10)

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


def dry_run_of(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> None:
    """Send a batch of ``Wrong``, a workload derived from ``base``, through it."""
    workload = load(f"{write(f'{RIGHT}class Wrong({base}):{body}')}:Wrong")()
    train = splits_of(data_of(workload), 0).train
    number = min(NUM_EXAMPLES, len(train))
    batches = Batches(train, torch.device("cpu"), workload.collate)
    whole, *others = (batches[Request(np.arange(size), size)] for size in (number, number // 2, 1))
    others.append(batches[Request(np.arange(len(train) - number, len(train)), number)])
    check_batch(workload, new_model(workload, config), whole, others, config, num_examples=2400)


def message_of(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> str:
    """Return the error message of a wrong workload."""
    with pytest.raises(UsageError) as raised:
        dry_run_of(write, body, base, config)
    return str(raised.value)


# --- right workloads


@pytest.mark.parametrize("base", ["Right", "Numbers"])
def test_right_workloads_pass(write: Write, base: str) -> None:
    dry_run_of(write, " ...", base)


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
    dry_run_of(write, f"\n    {body}\n")


OWN_OUTPUTS = """
    def create_model(self): return Formed(lambda outputs: (outputs, outputs))
    def loss(self, outputs, targets): return F.cross_entropy(outputs[0], targets.long(), reduction="none")
    def measure(self, outputs, targets): return {"accuracy": outputs[0].argmax(1) == targets}
    def predictions(self, outputs, targets): return {}
"""


def test_outputs_are_a_workloads_own_matter_if_it_overrides_what_uses_them(write: Write) -> None:
    dry_run_of(write, OWN_OUTPUTS)
    some = OWN_OUTPUTS.replace("def predictions(", "def _unused(")
    assert message_of(write, some).startswith("Wrong: the model returns a tuple, not a tensor of logits")


def test_a_regressions_outputs_are_its_own_matter_if_it_overrides_what_uses_them(write: Write) -> None:
    body = """
    def create_model(self): return nn.Linear(4, 3)
    def loss(self, outputs, targets): return outputs.sum(1) * targets
    def measure(self, outputs, targets): return {"rmse": targets, "mae": targets, "r2": targets}
    def summarize(self, means): return dict(means)
    def predictions(self, outputs, targets): return {}
"""
    dry_run_of(write, body, base="Numbers")


def test_columns_that_differ_between_batches_are_named(write: Write) -> None:
    body = """
    def load_data(self): return Data(Arrays(np.arange(80.0, dtype="f").reshape(20, 4), np.arange(20) % 10), examples(9))
    def prepare(self, inputs, generator): return inputs / 80
    def predictions(self, outputs, targets): return {"words": outputs[:, : 3 + int(targets[0])]}
"""
    said = "predictions: words differs in shape between examples, (3,) and (7,); pad them to one"
    assert message_of(write, body) == said


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        ("batch_loss(self, model, batch)", "batch_loss must take (self, model, batch, step)"),
        ("pictures(self, result, test)", "pictures must take (self, result, test, columns)"),
    ],
)
def test_a_method_with_other_arguments_is_named_with_its_line(write: Write, method: str, taken: str) -> None:
    line = RIGHT.count("\n") + 2
    message = message_of(write, f"\n    def {method}: ...\n")
    assert message == f"Wrong.{taken} (problem.py, line {line})"


OWN_OPTIMIZER = """
    def create_optimizer(self, model, config):
        return torch.optim.SGD(model.parameters(), lr=config.learning_rate)
"""


def unused_by(write: Write, body: str) -> set[str] | None:
    workload = load(f"{write(f'{RIGHT}class Wrong(Right):{body}')}:Wrong")()
    return try_batch(workload, splits_of(data_of(workload), 0).train, FP32, [10], Fraction(1))


def test_the_settings_that_a_workloads_own_optimizer_does_not_use_are_found(write: Write) -> None:
    unused = {"optimizer", "beta1", "beta2", "momentum", "weight_decay", "warmup_steps"}  # a schedule is used
    assert unused_by(write, OWN_OPTIMIZER) == unused
    examples = Split(Arrays(np.zeros((20, 28, 28), np.uint8), np.zeros(20, int)))
    assert try_batch(mnist(), examples, FP32, [10], Fraction(1)) is None


@pytest.mark.parametrize(("smoothing", "is_used"), [("0.0", False), ("step.config.label_smoothing", True)])
def test_label_smoothing_is_found_if_a_workloads_own_loss_does_not_use_it(
    write: Write, smoothing: str, is_used: bool
) -> None:
    own = f"""
    def batch_loss(self, model, batch, step):
        return F.cross_entropy(step.forward(batch), batch.targets, reduction="none", label_smoothing={smoothing})
"""
    assert unused_by(write, own) == (None if is_used else {"label_smoothing", "momentum"})


def test_several_optimizers_do_not_use_label_smoothing(write: Write) -> None:
    body = PARTS.replace("LOSSES", "F.cross_entropy(model(batch.inputs), batch.targets, reduction='none')")
    assert "label_smoothing" in (unused_by(write, body) or ())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16"), ("fp16", "torch.float16")]
)
def test_the_model_is_tried_in_the_precision_of_the_training(write: Write, precision: Precision, dtype: str) -> None:
    body = "\n    def create_model(self): return Formed(lambda outputs: {}[outputs.dtype])\n"
    assert f"KeyError: {dtype}" in message_of(write, body, config=TrainConfig(precision=precision))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", ["StepLR(optimizer, 1)", "OneCycleLR(optimizer, 0.1, total_steps)"])
def test_a_workloads_own_schedule_is_tried_with_the_runs_steps_without_a_warning(write: Write, schedule: str) -> None:
    dry_run_of(
        write,
        f"""
    def create_scheduler(self, optimizer, config, total_steps):
        assert total_steps == 150, total_steps
        return lr_scheduler.{schedule}
""",
    )


# --- wrong workloads


@pytest.mark.parametrize(
    ("flag", "config"),
    [("--reproducible", TrainConfig(reproducible=True)), ("--micro-batch-size", TrainConfig(micro_batch_size=4))],
)
def test_a_loss_that_compares_examples_is_refused_if_batches_are_cut(
    write: Write, flag: str, config: TrainConfig
) -> None:
    message = message_of(write, " compares_examples = True", config=config)
    assert message == f"{flag} cuts batches into parts, but Wrong's loss compares the examples of a batch"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def create_model(self): ...", ".create_model returned NoneType, not a torch.nn.Module"),
        ("def create_model(self): return nn.LazyLinear(10)",
         ".create_model: a lazy layer has no shape yet; first call the model on an example"),
        ("def create_model(self): return nn.Linear(4, 20)",
         ": the model returns 20 logits per example, but the data have 10 classes"),
        ("def create_model(self): return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))",
         ": the model returns no logits per example, but the data have 10 classes"),
        ("def loss(self, outputs, targets): return F.cross_entropy(outputs, targets)",
         '.loss must be one number per example, (16,) here, not (); use reduction="none", average other dimensions'),
        ("def loss(self, outputs, targets): return super().loss(outputs, targets) / (targets - 1)",
         ".loss is not finite on the first 16 examples with the initial weights"),
        ("def loss(self, outputs, targets): return super().loss(outputs.detach(), targets)",
         ".batch_loss does not depend on the model's parameters: nothing would be learned"),
        ('def create_model(self): return Spare("first", "second", "third")',
         ": parameters first and 2 more are not part of the loss; remove or freeze them; "
         "if other steps use them, set has_unused_parameters = True"),
        ("def create_model(self): return WithExtraState(4, 10)",
         ": the model's state_dict holds _extra_state, of type dict; a checkpoint keeps only tensors: use a buffer "
         "or a setting"),
        ('def measure(self, outputs, targets): return {"accuracy": 0.5}',
         ".measure: accuracy must be one number per example, (16,) here, not float"),
        ("def measure(self, outputs, targets): ...", ".measure returned NoneType, not a dict"),
        ("def measure(self, outputs, targets): return {'loss': targets}",
         ".measure: the loss is already measured; choose another name"),
        ('def predictions(self, outputs, targets): return {"label": targets, "weight": targets}',
         ".predictions: the column weight has another meaning; choose another name"),
        ('def predictions(self, outputs, targets): return {"label": targets, "logits": outputs.T}',
         ".predictions: logits must be a tensor with 16 examples here, (N, ...)"),
        ("def loss(self, outputs, targets): return F.cross_entropy(outputs @ outputs.T, targets, reduction='none')",
         ": an example's loss changes if other examples leave the batch, so it depends on the number of workers; "
         "mask the padding, or set compares_examples = True if intended"),
        ("def measure(self, outputs, targets):\n"
         "        return {'accuracy': (targets / 9).mean().expand(len(targets))}",
         ".measure: accuracy of an example changes if other examples leave the batch, so its mean over batches is "
         "not that over all examples; compute it in summarize_predictions"),
        ("def create_optimizer(self, model, config): return [torch.optim.SGD(model.parameters())] * 2",
         ".create_optimizer must return a torch.optim.Optimizer, or a dict of them by name, not list"),
        ("def summarize(self, means): return {}", ".summarize returns nothing, but Wrong.metrics names accuracy"),
        ("def summarize_predictions(self, columns): return {'auc': 1.0}",
         ".summarize and Wrong.summarize_predictions return accuracy, auc, but Wrong.metrics names accuracy"),
        ("def summarize(self, means): return {'accuracy': 'high'}", ": metric accuracy is 'high', not a number"),
        ("def create_model(self): return Formed(lambda outputs: SimpleNamespace(logits=outputs))",
         ": the model returns tensors in a SimpleNamespace, where they are not found; return tensors, or dicts, "
         "lists and tuples of them"),
        ("def create_model(self): return nn.EmbeddingBag(4, 10, sparse=True)\n"
         "    def prepare(self, inputs, generator): return inputs.long()",
         ": the gradient of weight is sparse; create its layer without sparse=True"),
        ("def create_model(self): model = Spare('mask'); model.mask.data[:] = -torch.inf; return model",
         ": the parameter mask is not finite at the start; if it is a mask, make it a buffer"),
        ("def create_model(self): scale = torch.rand(10); return Formed(lambda outputs: outputs * scale)",
         ": another new model computes something else with the same state_dict; make random tensors buffers, and "
         "keep layers in an nn.ModuleList"),
        ("compares_examples = True\n"
         "    def create_model(self): return Formed(lambda outputs: (outputs, torch.ones(10, 4)))\n"
         "    def check_outputs(self, outputs, targets): ...\n"
         "    def predictions(self, outputs, targets): return {}\n"
         "    def measure(self, outputs, targets): return {'accuracy': 0 * targets}\n"
         "    def loss(self, outputs, targets): return outputs[0].sum(1) + outputs[1].sum()",
         ": the model returns a tensor of 10 rows for each batch, as if they were examples; with compares_examples, "
         "return it as (1, …)"),
        ("metrics = ()", ".summarize returns accuracy, but Wrong.metrics names none"),
    ],
)  # fmt: skip
def test_a_workload_that_does_not_fit_is_refused_in_one_line(write: Write, body: str, expected: str) -> None:
    assert message_of(write, f"\n    {body}\n") == f"Wrong{expected}"


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("torch.cat([outputs, outputs])", "(32, 10) for 16 examples and (16, 10) for 8"),
        ("outputs @ outputs.T", "(16, 16) for 16 examples and (8, 8) for 8"),
    ],
)
def test_outputs_that_ranks_cannot_join_are_refused_if_the_loss_compares_examples(
    write: Write, form: str, shapes: str
) -> None:
    body = f"""
    compares_examples = True
    def create_model(self): return Formed(lambda outputs: {form})
    def check_outputs(self, outputs, targets): ...
    def predictions(self, outputs, targets): return {{}}
    def measure(self, outputs, targets): return {{"accuracy": 0 * targets}}
    def loss(self, outputs, targets): return outputs.sum() + 0 * targets
"""
    expected = f"an output is {shapes}; with compares_examples, return a row per example, such as its views (N, 2, …)"
    assert message_of(write, body) == f"Wrong: {expected}"


def test_a_parameter_that_the_forward_pass_changes_is_refused_if_it_would_be_changed_per_chunk(write: Write) -> None:
    message = message_of(
        write, "\n    def create_model(self): return Teaching()\n", config=TrainConfig(reproducible=True)
    )
    assert message == (
        "Wrong: the forward pass changes the parameter teacher, once per chunk with --reproducible; make it a buffer, "
        "or change it in a callback"
    )


@pytest.mark.parametrize("body", ["details(self, columns): return columns", "lines(self, columns): 1 / 0"])
def test_what_is_written_about_the_test_is_tried(write: Write, body: str) -> None:
    assert message_of(write, f"\n    def {body}\n").startswith("Wrong, details or lines: ")


def test_a_part_of_a_batch_is_tried_only_if_it_has_few_examples(
    few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Mock()
    monkeypatch.setattr("mnist_ray.job.dry_run.check_smallest", tried)
    try_batch(mnist(), Split(few_images), FP32, [256, 599], Fraction(1))
    assert [call.args[2].global_size for call in tried.call_args_list] == [1]
    tried.reset_mock()
    try_batch(mnist(), Split(few_images), TrainConfig(precision="fp32", micro_batch_size=5), [300], Fraction(1, 2))
    assert [call.args[2].global_size for call in tried.call_args_list] == [5]


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-4, {1, 8, 16}), (0.02, {1, 4, 8}), (0.1, {1, 2})])
def test_the_slower_an_example_is_the_fewer_are_tried(
    seconds: float, sizes: set[int], few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = mnist()
    prepare = Mock(side_effect=workload.prepare)
    monkeypatch.setattr(workload, "prepare", prepare)
    monkeypatch.setattr("mnist_ray.job.dry_run.time.perf_counter", itertools.count(0, seconds).__next__)
    try_batch(workload, Split(few_images), FP32, [300], Fraction(1))
    assert {len(call.args[0]) for call in prepare.call_args_list} == sizes


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def create_model(self): return nn.Linear(4, 3)", "(16, 3) for targets (16,); both must be one number"),
        ("def load_data(self): part = Arrays(np.ones((20, 4), 'f'), np.ones((20, 1), 'f')); return Data(part, part)",
         "(16, 1) for targets (16, 1); both must be one number"),
        ("def create_model(self): return Formed(lambda outputs: (outputs, outputs), 1)", "a tuple, not a tensor"),
    ],
)  # fmt: skip
def test_a_regression_model_must_give_one_number_per_example(write: Write, body: str, expected: str) -> None:
    assert message_of(write, f"\n    {body}\n", "Numbers").startswith(f"Wrong: the model returns {expected}")


def test_a_regression_model_must_take_a_single_example(write: Write) -> None:
    message = message_of(write, "\n    def create_model(self): return Formed(torch.squeeze, 1)\n", "Numbers")
    assert message.startswith("Wrong, an evaluation of 1 example: TypeError: len() of a 0-d tensor")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("np.arange(20)", " has target 3, but the classes are 0 to 2"),
        ("np.full(20, -1)", " has target -1, but the classes are 0 to 2"),
        ("np.zeros((20, 1), np.int64)", ": targets must be integers (N,), not int64 ({}, 1)"),
        ("np.zeros(20, np.float32)", ": targets must be integers (N,), not float32 ({},)"),
    ],
)
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_targets_outside_the_classes_are_found_in_arrays_and_in_the_batch_of_a_dataset(
    write: Write, kind: str, targets: str, expected: str
) -> None:
    examples = f"Arrays(np.ones((20, 4), np.float32), {targets})"
    if kind == "dataset":
        examples = f"list(zip(np.ones((20, 4), np.float32), {targets}))"
    body = f"""
    def load_data(self):
        part = {examples}
        return Data(part, part, metadata={{"class_names": ["a", "b", "c"]}})
"""
    where = "Wrong.load_data: train" if kind == "arrays" else "Wrong"
    assert message_of(write, body) == where + expected.format(20 if kind == "arrays" else 16)


@pytest.mark.parametrize("model", ["nn.Linear(4, 10)", "nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 10))"])
@pytest.mark.parametrize("convert", ["double", "byte"])
def test_inputs_of_another_dtype_than_the_weights_are_refused_with_what_to_do(
    write: Write, model: str, convert: str
) -> None:
    body = f"""
    def create_model(self): return {model}
    def prepare(self, inputs, generator): return inputs.{convert}()
"""
    assert message_of(write, body).endswith("; return inputs.float() from prepare")


def test_tensors_that_the_model_creates_in_another_precision_are_refused_with_what_to_do(write: Write) -> None:
    body = """
    def create_model(self): return Summed()
    def prepare(self, inputs, generator): return {"inputs": inputs}

class Summed(nn.Linear):
    def __init__(self): super().__init__(4, 10)
    def forward(self, taken):
        features = super().forward(taken["inputs"])
        return torch.zeros(features.shape).index_add(0, torch.arange(len(features)), features)
"""
    message = message_of(write, body, config=TrainConfig(precision="bf16"))
    assert message.endswith("; create one of the tensors with the other's new_zeros(…), or use --precision fp32")


@pytest.mark.parametrize("base", ["Right", "Numbers"])
def test_targets_that_collate_returns_as_a_list_are_refused(write: Write, base: str) -> None:
    body = """
    def load_data(self):
        part = list(zip(np.ones((20, 4), np.float32), [0, 1] * 10))
        return Data(part, part, metadata={"class_names": [*range(10)]})
    def collate(self, examples): return torch.tensor(np.stack([one for one, _ in examples])), [0] * len(examples)
"""
    assert message_of(write, body, base) == (
        "Wrong: a batch's targets are a list; return torch.tensor(targets) from collate, or numbers from the Dataset"
    )


CONTENT = "tensors, numbers and strings, as torch.optim returns them"
OF_CHECKPOINT = f"Wrong, a checkpoint of the state_dict of optimizer and schedule ({CONTENT})"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def create_scheduler(self, optimizer, *_, **__): return WithFunction(optimizer)",
         f"{OF_CHECKPOINT}: "),
        ("def create_optimizer(self, model, *_): return Wrapping(model.parameters())",
         f"{OF_CHECKPOINT}: KeyError: 'state'"),
        ("def create_optimizer(self, model, *_): return Exact(model.parameters())",
         "a checkpoint cannot hold 0.momentum_buffer (complex128, strided); use another type"),
        ("def create_model(self): return nn.Linear(4, 10, dtype=torch.complex128)",
         "a checkpoint cannot hold weight (complex128, strided); use another type, or persistent=False"),
    ],
)  # fmt: skip
def test_a_step_or_a_checkpoint_that_would_fail_is_refused(write: Write, body: str, expected: str) -> None:
    assert message_of(write, f"\n    {body}\n").startswith(expected)


# --- code that fails


@pytest.mark.parametrize(
    "signature",
    [
        "load_data(self)",
        "metadata_of(self, data)",
        "batch_loss(self, model, batch, step)",
        "training_step(self, step)",
        "create_model(self)",
        "prepare(self, inputs, generator)",
        "check_outputs(self, outputs, targets)",
        "loss(self, outputs, targets)",
        "measure(self, outputs, targets)",
        "summarize(self, means)",
        "summarize_predictions(self, columns)",
        "predictions(self, outputs, targets)",
        "create_optimizer(self, model, config)",
        "create_scheduler(self, optimizer, config, total_steps)",
    ],
)
def test_code_that_fails_is_named_with_its_line(write: Write, signature: str) -> None:
    message = message_of(write, f"\n    def {signature}:\n        raise ValueError('oops')\n")
    line = len(RIGHT.splitlines()) + 3
    place = "training_step" if "step)" in signature else signature.split("(")[0]
    assert message == f"Wrong, {place}: ValueError: oops (problem.py, line {line})"


@pytest.mark.parametrize(
    ("model", "where", "expected"),
    [
        ("Formed(lambda outputs: outputs @ torch.ones(7, 10))", "", "(16x10 and 7x10) (problem.py, line "),
        ("nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(7, 10))", ", in 2 (Linear)", "(16x8 and 7x10)"),
    ],
)
def test_a_model_that_fails_is_named_with_its_line_in_the_file_or_its_layer(
    write: Write, model: str, where: str, expected: str
) -> None:
    message = message_of(write, f"\n    def create_model(self): return {model}\n")
    assert message.startswith(f"Wrong, the model{where}: RuntimeError: ")
    assert expected in message


@pytest.mark.parametrize("error", [JobError, UsageError])
def test_an_error_in_one_line_is_raised_unchanged(write: Write, error: type[Exception]) -> None:
    line = f"from mnist_ray.errors import {error.__name__}; raise {error.__name__}('the file is damaged')"
    with pytest.raises(error, match=r"^the file is damaged$"):
        dry_run_of(write, f"\n    def load_data(self): {line}\n")


# --- data of the wrong kind


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("None", "returned NoneType, not mnist_ray.workload.Data"),
        ("Data(examples(3), 5)", ": test is of type int, neither Arrays(inputs, targets) nor a Dataset with a length"),
        ("Data(examples(3), type('Stream', (torch.utils.data.IterableDataset,), {'__iter__': iter})())",
         ": test is a stream without a length; only the training data may be one"),
        ("Data(examples(0), examples(3))", ": train holds no examples"),
        ("Data(type('Padded', (list,), {'collate_fn': 1})([1]), examples(3))",
         ": train has a collate_fn, but nothing calls it: make it Wrong.collate(examples)"),
        ("Data(examples(3), Arrays(np.ones((1200, 4)), np.arange(1199)))",
         ": test has 1,200 inputs but 1,199 targets"),
        ("Data(Arrays(torch.ones(3, 4), np.arange(3)), examples(3))",
         ": train: inputs must be a NumPy array (N, ...), not Tensor; call .numpy()"),
        ("Data(examples(3), Arrays({'x': [1, 2, 3]}, np.ones(3)))",
         ': test: inputs["x"] must be a NumPy array (N, ...), not list'),
        ("Data(Arrays(np.ones(3), None), examples(3))",
         ": train: targets must be a NumPy array (N, ...), not NoneType; without targets, repeat the inputs"),
        ("Data(Arrays(np.ma.ones((3, 4)), np.arange(3)), examples(3))",
         ": train: inputs are a masked array, whose mask would be ignored; call .filled(VALUE)"),
        ("Data(Arrays(np.array(3.0), np.array(3)), examples(3))",
         ": train: inputs must be a NumPy array (N, ...), not a single number"),
        ("Data(examples(3), Arrays(np.ones((2, 4)), np.array(['a', 'b'])))",
         ": test: targets must be numbers, not of dtype <U1"),
    ],
)  # fmt: skip
def test_data_of_the_wrong_kind_are_refused(write: Write, returned: str, expected: str) -> None:
    separator = "" if expected.startswith(":") else " "
    message = message_of(write, f"\n    def load_data(self): return {returned}\n")
    assert message == f"Wrong.load_data{separator}{expected}"


@pytest.mark.parametrize("fact", ["np.float32(1)", "np.ones(3)", "{1, 2}", "math.nan"])
def test_metadata_that_are_not_json_are_refused(write: Write, fact: str) -> None:
    body = f"\n    def load_data(self): return Data(examples(20), examples(20), metadata={{'mean': {fact}}})\n"
    assert "not JSON" in message_of(write, body)


def test_a_file_that_is_missing_from_the_datas_files_is_named(write: Write) -> None:
    body = "\n    def load_data(self): return Data(examples(3), examples(3), files=['/gone.jpg'])\n"
    assert message_of(write, body).startswith("Wrong, load_data: FileNotFoundError: ")
    assert "'/gone.jpg'" in message_of(write, body)


# --- open steps

PARTS = """
    def create_optimizer(self, model, config):
        return {"first": torch.optim.SGD(model.parameters(), 0.1)}
    def training_step(self, step):
        step.backward(self.own_loss, optimizer="first")
        step.update("first")
    def own_loss(self, model, batch, step):
        return LOSSES
"""


TWICE = PARTS.replace("step.update", "step.backward(self.own_loss)\n        step.update")
LBFGS = "\n    def create_optimizer(self, model, config): return torch.optim.LBFGS(model.parameters())\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PARTS.replace("LOSSES", "model(batch.inputs).sum()"),
         "Wrong.own_loss must be one number per example, (16,) here, not ()"),
        (PARTS.replace("LOSSES", "torch.zeros(len(batch.targets))"), "Wrong.own_loss does not depend on the model's"),
        (PARTS.replace("LOSSES", "1 / 0"), "Wrong, training_step: ZeroDivisionError"),
        (TWICE.replace("LOSSES", "model(batch.inputs.mul_(2))[:, 0]"),
         "Wrong: a batch is changed in place, but training_step"),
        (PARTS.replace('optimizer="first"', 'optimizer="last"'),
         "Wrong.training_step: there is no optimizer 'last'; name one of first"),
        ("\n    def training_step(self, step): step.update()\n", "Wrong.training_step must call step.backward"),
        ("\n    def create_scheduler(self, optimizer, *_):"
         " return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)\n",
         "ReduceLROnPlateau has mode='min', but looks at accuracy; create it with mode='max'"),
        (LBFGS, "override training_step: step.update(closure=lambda: step.backward(self.batch_loss))"),
        (LBFGS + "    def training_step(self, step): step.update(closure=lambda: step.backward(self.batch_loss))\n",
         "--precision fp16 does not work with a closure in step.update"),
    ],
)  # fmt: skip
def test_a_wrong_open_step_is_one_line(write: Write, body: str, message: str) -> None:
    config = TrainConfig(precision="fp16" if "LBFGS" in body else "fp32")
    assert message in message_of(write, body, config=config)


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
    assert ("validation gets them, too" in note_of_transforms(mnist(), held_out)) is is_random
    assert note_of_transforms(mnist(), given) == ""
