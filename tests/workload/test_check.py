from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist_ray.config import Precision, TrainConfig
from mnist_ray.errors import JobError, UsageError
from mnist_ray.training.batches import batches_of
from mnist_ray.training.sampler import Slice
from mnist_ray.workload.check import NUM_EXAMPLES, check_batch
from mnist_ray.workload.data import splits_of
from mnist_ray.workload.source import load, load_data

Write = Callable[..., Path]
FP32 = TrainConfig(precision="fp32")

RIGHT = """
import math
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from mnist_ray.errors import JobError
from mnist_ray.workload import Arrays, Classification, Data, Metric, Regression, Workload

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

class Spare(nn.Linear):
    def __init__(self, *names):
        super().__init__(4, 10)
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(3)))
"""


def dry_run_of(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> dict[str, Any] | None:
    """Load what ``Wrong``, a workload derived from ``base``, says is its data, and let a batch go through it."""
    workload = load(f"{write(f'{RIGHT}class Wrong({base}):{body}')}:Wrong")()
    train = splits_of(load_data(workload), 0).train
    batch = batches_of(train, torch.device("cpu"))[Slice(np.arange(min(NUM_EXAMPLES, len(train))))]
    return check_batch(workload, batch.inputs, batch.targets, config)


def message_of(write: Write, body: str, base: str = "Right", config: TrainConfig = FP32) -> str:
    """Return what is said of a workload that does not fit."""
    with pytest.raises(UsageError) as raised:
        dry_run_of(write, body, base, config)
    return str(raised.value)


def line_of(body: str) -> int:
    """Return the line of the file in which a workload's body has ``# here``."""
    return next(i for i, line in enumerate(f"{RIGHT}class Wrong(Right):{body}".splitlines(), 1) if "# here" in line)


# --- what fits


@pytest.mark.parametrize("base", ["Right", "Numbers"])
def test_a_workload_that_fits_is_told_what_its_model_takes(write: Write, base: str) -> None:
    assert dry_run_of(write, " ...", base) == {"shape": [4], "dtype": "float32"}


def test_the_model_takes_what_prepare_makes_of_the_inputs(write: Write) -> None:
    body = """
    def create_model(self): return nn.Sequential(nn.Flatten(), nn.Linear(4, 10, dtype=torch.float64))
    def prepare(self, inputs, generator): return inputs.reshape(-1, 2, 2).double()
"""
    assert dry_run_of(write, body) == {"shape": [2, 2], "dtype": "float64"}


def test_what_is_no_tensor_has_no_shape(write: Write) -> None:
    body = """
    def create_model(self):
        class Model(nn.Linear):
            def forward(self, inputs): return super().forward(inputs["x"])
        return Model(4, 10)
    def prepare(self, inputs, generator): return {"x": inputs}
"""
    assert dry_run_of(write, body) is None


def test_augmentation_has_a_generator_in_training_only(write: Write) -> None:
    body = """
    def prepare(self, inputs, generator):
        self.metadata.setdefault("has_generator", []).append(generator is not None)
        return inputs
    def predictions(self, outputs, targets):
        assert self.metadata["has_generator"] == [True, False]
        return super().predictions(outputs, targets)
"""
    dry_run_of(write, body)


def test_a_parameter_that_is_frozen_need_not_take_part(write: Write) -> None:
    dry_run_of(write, '\n    def create_model(self): model = Spare("a"); model.a.requires_grad = False; return model\n')


def test_fewer_examples_than_a_batch_are_enough(write: Write) -> None:
    body = (
        '\n    def load_data(self): return Data(examples(3), examples(3), metadata={"class_names": list(range(10))})\n'
    )
    dry_run_of(write, body)


def test_a_data_set_of_pairs_is_enough(write: Write) -> None:
    body = """
    def load_data(self):
        pairs = [(np.ones(4, np.float32), i % 10) for i in range(20)]
        return Data(pairs, pairs, metadata={"class_names": list("abcdefghij")})
"""
    dry_run_of(write, body)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16"), ("fp16", "torch.float16")]
)
def test_the_model_is_tried_in_the_precision_of_the_training(write: Write, precision: Precision, dtype: str) -> None:
    body = """
    def create_model(self):
        class Model(nn.Linear):
            def forward(self, inputs):
                outputs = super().forward(inputs)
                if self.training: raise ValueError(outputs.dtype)
                return outputs
        return Model(4, 10)
"""
    assert f"ValueError: {dtype}" in message_of(write, body, config=TrainConfig(precision=precision))


def test_the_loss_gets_fp32_and_measure_no_graph_whatever_holds_the_outputs(write: Write) -> None:
    body = """
    def create_model(self):
        class Model(nn.Linear):
            def forward(self, inputs): return {"logits": super().forward(inputs)}
        return Model(4, 10)
    def check_outputs(self, outputs, targets): ...
    def loss(self, outputs, targets):
        assert outputs["logits"].dtype is torch.float32
        return super().loss(outputs["logits"], targets)
    def measure(self, outputs, targets):
        assert outputs["logits"].grad_fn is None
        return super().measure(outputs["logits"], targets)
    def predictions(self, outputs, targets): return super().predictions(outputs["logits"], targets)
"""
    dry_run_of(write, body, config=TrainConfig(precision="bf16"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", ["StepLR(optimizer, 1)", "OneCycleLR(optimizer, 0.1, total_steps)"])
def test_a_schedule_of_ones_own_is_tried_without_a_warning(write: Write, schedule: str) -> None:
    dry_run_of(
        write,
        f"""
    def create_scheduler(self, optimizer, config, total_steps):
        return torch.optim.lr_scheduler.{schedule}
""",
    )


# --- models and losses that do not fit


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("create_model(self): ...", "Wrong.create_model returned NoneType, not a torch.nn.Module"),
        ("create_model(self): return F.relu", "Wrong.create_model returned function, not a torch.nn.Module"),
        (
            "create_model(self): return nn.LazyLinear(10)",
            "Wrong.create_model: a lazy layer has no shape yet; call the model once on an example there",
        ),
        (
            "create_model(self): return nn.Linear(4, 20)",
            "Wrong: the model gives 20 logits per example, but the data have 10 classes",
        ),
        (
            "create_model(self): return nn.Linear(4, 5)",
            "Wrong: the model gives 5 logits per example, but the data have 10 classes",
        ),
        (
            "create_model(self): return nn.Sequential(nn.Linear(4, 20), nn.Unflatten(1, (10, 2)))",
            "Wrong: the model gives 10 × 2 logits per example, but the data have 10 classes",
        ),
        (
            "create_model(self): return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))",
            "Wrong: the model gives no logits per example, but the data have 10 classes",
        ),
        (
            "loss(self, outputs, targets): return F.cross_entropy(outputs, targets)",
            "Wrong.loss is to be one number per example, (16,) here, not ()",
        ),
        (
            "loss(self, outputs, targets): return outputs",
            "Wrong.loss is to be one number per example, (16,) here, not (16, 10)",
        ),
        (
            "loss(self, outputs, targets): return 0.5",
            "Wrong.loss is to be one number per example, (16,) here, not float",
        ),
        ("loss(self, outputs, targets): ...", "Wrong.loss is to be one number per example, (16,) here, not NoneType"),
        (
            "loss(self, outputs, targets): return super().loss(outputs, targets) / (targets - 1)",
            "Wrong.loss is not finite on the first 16 examples, with the initial weights",
        ),
        (
            "loss(self, outputs, targets): return super().loss(outputs, targets) * math.nan",
            "Wrong.loss is not finite on the first 16 examples, with the initial weights",
        ),
        (
            "loss(self, outputs, targets): return super().loss(outputs.detach(), targets)",
            "Wrong.loss does not depend on the model's parameters: nothing would be learned",
        ),
        (
            "create_model(self): return nn.ConstantPad1d((0, 6), 0)",
            "Wrong.loss does not depend on the model's parameters: nothing would be learned",
        ),
        (
            'create_model(self): return Spare("first")',
            "Wrong: parameter first takes no part in the loss; leave out what is not used, or freeze it",
        ),
        (
            'create_model(self): return Spare("first", "second", "third")',
            "Wrong: parameters first and 2 more take no part in the loss; leave out what is not used, or freeze it",
        ),
        (
            'measure(self, outputs, targets): return {"accuracy": (outputs.argmax(1) == targets).float().mean()}',
            "Wrong.measure: accuracy is to be one number per example, (16,) here, not ()",
        ),
        (
            'measure(self, outputs, targets): return {"accuracy": 0.5}',
            "Wrong.measure: accuracy is to be one number per example, (16,) here, not float",
        ),
        (
            'predictions(self, outputs, targets): return {"label": targets, "logits": outputs}',
            "Wrong.predictions: logits is to be one number per example, (16,) here, not (16, 10)",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(write: Write, body: str, expected: str) -> None:
    assert message_of(write, f"\n    def {body}\n") == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            'metrics = (Metric("top5", "max"),)',
            "Wrong.summarize returns accuracy, but Wrong.metrics names top5",
        ),
        ("metrics = ()", "Wrong.summarize returns accuracy, but Wrong.metrics names none"),
        (
            "def summarize(self, means): return {}",
            "Wrong.summarize returns nothing, but Wrong.metrics names accuracy",
        ),
        (
            'def summarize(self, means): return {"accuracy": 1, "error": 0}',
            "Wrong.summarize returns accuracy, error, but Wrong.metrics names accuracy",
        ),
    ],
)
def test_metrics_that_are_not_those_that_are_summarized_are_named(write: Write, body: str, expected: str) -> None:
    assert message_of(write, f"\n    {body}\n") == expected


@pytest.mark.parametrize(
    ("layer", "shape"),
    [("nn.Linear(4, 3)", "(16, 3)"), ("nn.Sequential(nn.Linear(4, 1), nn.Unflatten(1, (1, 1)))", "(16, 1, 1)")],
)
def test_a_regression_whose_model_gives_other_than_a_number_is_refused(write: Write, layer: str, shape: str) -> None:
    message = message_of(write, f"\n    def create_model(self): return {layer}\n", "Numbers")
    assert message == f"Wrong: the model gives {shape} for targets (16,); both are to be one number per example"


def test_a_regression_on_targets_in_a_column_is_refused(write: Write) -> None:
    body = """
    def load_data(self):
        part = Arrays(np.ones((20, 4), np.float32), np.ones((20, 1), np.float32))
        return Data(part, part)
"""
    expected = "Wrong: the model gives (16, 1) for targets (16, 1); both are to be one number per example"
    assert message_of(write, body, "Numbers") == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("np.arange(20)", " has a target 3, but the classes are 0 to 2"),
        ("np.full(20, -1)", " has a target -1, but the classes are 0 to 2"),
        ("np.zeros((20, 1), np.int64)", ": targets are to be whole numbers (N,), not int64 (20, 1)"),
        ("np.zeros(20, np.float32)", ": targets are to be whole numbers (N,), not float32 (20,)"),
        ("np.zeros(20, bool)", ": targets are to be whole numbers (N,), not bool (20,)"),
    ],
)
def test_targets_that_are_no_classes_are_refused(write: Write, targets: str, expected: str) -> None:
    body = f"""
    def load_data(self):
        part = Arrays(np.ones((20, 4), np.float32), {targets})
        return Data(part, part, metadata={{"class_names": ["a", "b", "c"]}})
"""
    assert message_of(write, body) == f"Wrong.load_data: train{expected}"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("np.arange(20)", "there is a target 3, but the classes are 0 to 2"),
        ("np.full(20, -1)", "there is a target -1, but the classes are 0 to 2"),
        ("np.zeros((20, 1), np.int64)", "targets are to be whole numbers (N,), not torch.int64 (16, 1)"),
        ("np.zeros(20, np.float32)", "targets are to be whole numbers (N,), not torch.float32 (16,)"),
    ],
)
def test_targets_of_a_data_set_that_are_no_classes_are_found_in_the_batch(
    write: Write, targets: str, expected: str
) -> None:
    body = f"""
    def load_data(self):
        pairs = list(zip(np.ones((20, 4), np.float32), {targets}))
        return Data(pairs, pairs, metadata={{"class_names": ["a", "b", "c"]}})
    def create_model(self):
        return nn.Linear(4, 3)
"""
    assert message_of(write, body) == f"Wrong: {expected}"


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_target_that_is_no_class_is_found_wherever_it_stands(write: Write, part: str) -> None:
    body = f"""
    def load_data(self):
        part = examples(20)
        part.targets[:] %= 3
        wrong = Arrays(part.inputs, part.targets.copy())
        wrong.targets[-1] = 3
        return Data(**{{"train": part, "test": part, "{part}": wrong}}, metadata={{"class_names": ["a", "b", "c"]}})
"""
    assert message_of(write, body) == f"Wrong.load_data: {part} has a target 3, but the classes are 0 to 2"


@pytest.mark.parametrize(
    "method", ["measure(self, outputs, targets)", "predictions(self, outputs, targets)", "summarize(self, means)"]
)
def test_a_method_that_returns_nothing_is_named(write: Write, method: str) -> None:
    message = message_of(write, f"\n    def {method}: ...\n")
    assert message == f"Wrong.{method.split('(')[0]} returned NoneType, not a dict"


@pytest.mark.parametrize(("base", "expected"), [("Right", "a tensor of logits"), ("Numbers", "a tensor")])
def test_outputs_that_are_no_tensor_are_named_where_one_is_wanted(write: Write, base: str, expected: str) -> None:
    body = """
    def create_model(self):
        class Model(nn.Linear):
            def forward(self, inputs): return super().forward(inputs), inputs
        return Model(4, 10)
"""
    assert message_of(write, body, base) == f"Wrong: the model gives a tuple, not {expected}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            """
    def create_scheduler(self, optimizer, config, total_steps):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
""",
            "Wrong, a step of the optimizer, and one of the schedule, without a metric, after it: TypeError: "
            "ReduceLROnPlateau.step() missing 1 required positional argument: 'metrics'",
        ),
        (
            """
    def create_optimizer(self, model, config): return torch.optim.LBFGS(model.parameters())
""",
            "Wrong, a step of the optimizer, and one of the schedule, without a metric, after it: TypeError: "
            "LBFGS.step() missing 1 required positional argument: 'closure'",
        ),
        (
            """
    def create_scheduler(self, optimizer, config, total_steps):
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        schedule.factor_of = lambda step: 1.0
        return schedule
""",
            "Wrong, a checkpoint of the optimizer and the schedule, which holds tensors, numbers and texts: ",
        ),
        (
            """
    def create_model(self):
        class Model(nn.Linear):
            def get_extra_state(self): return {"calls": 3}
            def set_extra_state(self, state): ...
        return Model(4, 10)
""",
            "Wrong: the model's state_dict holds _extra_state, of type dict; a checkpoint keeps tensors: make it a "
            "buffer, or a setting",
        ),
    ],
    ids=[
        "a schedule that wants a metric",
        "an optimizer that wants a closure",
        "a function in the schedule",
        "extra state",
    ],
)
def test_what_would_fail_at_a_step_or_a_checkpoint_is_said_before(write: Write, body: str, expected: str) -> None:
    assert message_of(write, body).startswith(expected)


# --- code that fails


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("def load_data(self): raise ValueError('oops')  # here", "load_data"),
        ("def metadata_of(self, data): raise ValueError('oops')  # here", "metadata_of"),
        ("def create_model(self): raise ValueError('oops')  # here", "create_model"),
        ("def prepare(self, inputs, generator): raise ValueError('oops')  # here", "prepare"),
        ("def check_outputs(self, outputs, targets): raise ValueError('oops')  # here", "check_outputs"),
        ("def loss(self, outputs, targets): raise ValueError('oops')  # here", "loss"),
        ("def measure(self, outputs, targets): raise ValueError('oops')  # here", "measure"),
        ("def summarize(self, means): raise ValueError('oops')  # here", "summarize"),
        ("def predictions(self, outputs, targets): raise ValueError('oops')  # here", "predictions"),
        ("def create_optimizer(self, model, config): raise ValueError('oops')  # here", "create_optimizer"),
        (
            "def create_scheduler(self, optimizer, config, total_steps): raise ValueError('oops')  # here",
            "create_scheduler",
        ),
    ],
)
def test_code_that_fails_is_named_with_its_line(write: Write, body: str, what: str) -> None:
    body = f"\n    {body}\n"
    assert message_of(write, body) == f"Wrong, {what}: ValueError: oops (problem.py, line {line_of(body)})"


def test_a_model_that_fails_is_named_with_its_line(write: Write) -> None:
    body = """
    def create_model(self):
        class Model(nn.Linear):
            def forward(self, inputs):
                hidden = super().forward(inputs)
                return hidden @ torch.ones(7, 10)  # here
        return Model(4, 10)
"""
    message = message_of(write, body)
    assert message.startswith("Wrong, the model: RuntimeError: ")
    assert message.endswith(f"(16x10 and 7x10) (problem.py, line {line_of(body)})")


def test_a_model_that_fails_outside_the_file_is_named_with_what_failed(write: Write) -> None:
    message = message_of(write, "\n    def create_model(self): return nn.Linear(5, 10)\n")
    assert message.startswith("Wrong, the model: RuntimeError: ")
    assert "(16x4 and 5x10)" in message


@pytest.mark.parametrize("error", ["JobError", "UsageError"])
def test_an_error_in_one_line_is_handed_on_as_it_is(write: Write, error: str) -> None:
    body = f"""
    def load_data(self):
        from mnist_ray.errors import {error}
        raise {error}("the file is damaged")
"""
    with pytest.raises((JobError, UsageError), match=r"^the file is damaged$") as raised:
        dry_run_of(write, body)
    assert raised.type.__name__ == error


# --- data that are none


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("None", "returned NoneType, not mnist_ray.workload.Data"),
        ("(examples(3), examples(3))", "returned tuple, not mnist_ray.workload.Data"),
        ("Data", "returned type, not mnist_ray.workload.Data"),
        ("Data(None, examples(3))", ": train is of type NoneType, neither Arrays nor a Dataset with a length"),
        ("Data(examples(3), 5)", ": test is of type int, neither Arrays nor a Dataset with a length"),
        ("Data(examples(3), examples(3), (i for i in 'ab'))",
         ": validation is of type generator, neither Arrays nor a Dataset with a length"),
        ("Data(type('Stream', (torch.utils.data.IterableDataset,), {'__iter__': iter})(), examples(3))",
         ": train is of type Stream, neither Arrays nor a Dataset with a length"),
        ("Data(examples(0), examples(3))", ": train holds no examples"),
        ("Data(examples(3), examples(0))", ": test holds no examples"),
        ("Data(examples(3), examples(3), examples(0))", ": validation holds no examples"),
        ("Data([], examples(3))", ": train holds no examples"),
        ("Data(examples(3), Arrays(np.ones((1200, 4)), np.arange(1199)))",
         ": test has 1,200 inputs but 1,199 targets"),
        ("Data(Arrays(torch.ones(3, 4), np.arange(3)), examples(3))",
         ": train: inputs are to be a NumPy array (N, ...), not Tensor"),
        ("Data(Arrays(np.ones((3, 4)), [0, 1, 2]), examples(3))",
         ": train: targets are to be a NumPy array (N, ...), not list"),
        ("Data(Arrays(np.array(3.0), np.array(3)), examples(3))",
         ": train: inputs are to be a NumPy array (N, ...), not a single number"),
        ("Data(Arrays(np.array([[1], [2, 3]], dtype=object), np.arange(2)), examples(3))",
         ": train: inputs are to be numbers, not of dtype object"),
        ("Data(examples(3), Arrays(np.ones((2, 4)), np.array(['a', 'b'])))",
         ": test: targets are to be numbers, not of dtype <U1"),
        ("Data(Arrays(np.ones((3, 4), complex), np.arange(3)), examples(3))",
         ": train: inputs are to be numbers, not of dtype complex128"),
        ("Data(Arrays(np.zeros(3, 'datetime64[s]'), np.arange(3)), examples(3))",
         ": train: inputs are to be numbers, not of dtype datetime64[s]"),
        ("Data(examples(3), examples(3), files=['/gone.jpg'])",
         ": files are to be paths of files: [Errno 2] No such file or directory: '/gone.jpg'"),
        ("Data(examples(3), examples(3), files=[3])",
         ": files are to be paths of files: expected str, bytes or os.PathLike object, not int"),
        ("Data(examples(3), examples(3), files=3)",
         ": files are to be paths of files: 'int' object is not iterable"),
    ],
)  # fmt: skip
def test_data_that_are_none_are_refused(write: Write, returned: str, expected: str) -> None:
    separator = "" if expected.startswith(":") else " "
    message = message_of(write, f"\n    def load_data(self): return {returned}\n")
    assert message == f"Wrong.load_data{separator}{expected}"


@pytest.mark.parametrize("fact", ["np.float32(1)", "np.ones(3)", "{1, 2}", "(1, 2)", "{1: 2}", "math.nan"])
def test_facts_that_are_no_json_are_refused(write: Write, fact: str) -> None:
    body = f"\n    def load_data(self): return Data(examples(20), examples(20), metadata={{'mean': {fact}}})\n"
    expected = "Wrong: fact 'mean' is no JSON: use numbers, texts, lists and dicts, as array.tolist()"
    assert message_of(write, body) == expected


def test_facts_that_are_nothing_are_refused(write: Write) -> None:
    body = "\n    def metadata_of(self, data): ...\n    def create_model(self): return nn.Linear(4, 1)\n"
    assert message_of(write, body, "Numbers") == "Wrong.metadata_of returned NoneType, not a dict"
