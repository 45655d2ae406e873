"""Tries a workload while Ray starts: evaluations, two real steps and a checkpoint, with at most 16 examples.

The trainer and the evaluation themselves call the workload, so what fails here would fail in a worker. An error in the
user's code becomes one line. The checks find what a single process cannot show, or would show too late.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import re
import timeit
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree

from mnist_ray.checkpoints.checkpoint import check_kept, snapshot
from mnist_ray.checkpoints.tensor_files import check_held
from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import Batches, MicroBatch
from mnist_ray.data.data import Arrays, Blocks, Split
from mnist_ray.data.readers import seed_generators
from mnist_ray.data.sampler import Request
from mnist_ray.data.tensors import detached
from mnist_ray.errors import ExampleError, UsageError, with_place
from mnist_ray.parallel import sharding
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.text import count
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate, evaluating
from mnist_ray.training.metrics import WEIGHT, Evaluation, TrainingDivergedError
from mnist_ray.training.state import TrainingState, create_optimizers
from mnist_ray.training.step import Step, check_per_example, forward
from mnist_ray.training.trainer import Trainer
from mnist_ray.workload import Classification, Regression, Workload
from mnist_ray.workload.calls import picture_of, placed, seeded_model
from mnist_ray.workload.figures import NOT_PREDICTED
from mnist_ray.workload.user_code import check_members

NUM_EXAMPLES = 16  # in a batch of the trial, or fewer if they are slow
_MAX_S = 1.0  # for all passes together
_NUM_PASSES = 11  # of that batch, if a backward pass counts as two
_NUM_REREAD = 8  # examples of the validation set; a transform may leave half of them as they are
_REMEDIES = {  # by the text of errors that PyTorch raises
    "Error: .*'closure'": "override training_step: step.update(closure=lambda: step.backward(self.batch_loss))",
    "Error: .*(BFloat16|Half)": "create one of the tensors with the other's new_zeros(…), or use --precision fp32",
    "Error: .*(dtype|scalar type|bias type|not implemented for)": "return inputs.float() from prepare",
}


def try_batch(
    workload: Workload,
    train: Split,
    config: TrainConfig,
    batch_sizes: Sequence[int],
    part: Fraction,
    num_workers: int = 1,
    *,
    is_validated: bool = True,
) -> None:
    """Train a workload's new model on its first examples, and evaluate it. Raises UsageError with an error's place.

    ``part``: the smallest part of a batch that a worker gets or, with --reproducible, computes at a time.
    """
    try:
        _Trial(workload, train, config, num_workers, is_validated=is_validated).run(batch_sizes, part)
    except (Exception, SystemExit) as error:
        try:
            with placed(workload, _place_in(workload, error)):
                raise
        except UsageError as in_one_line:
            fixes = [fix for pattern, fix in _REMEDIES.items() if re.search(pattern, str(in_one_line))]
            if not fixes:
                raise
            raise UsageError(str(in_one_line), fix=fixes[0]) from error


def _place_in(workload: Workload, error: BaseException) -> str:
    """Return the method of a workload that has raised an error, or the layer: ``the model, in layers.3 (Linear)``."""
    if isinstance(error, ExampleError):
        return "an example"
    seen = [(frame.f_code.co_name, frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    methods = [name for name, owner in seen if owner is workload and hasattr(Workload, name)]
    layers = [owner for _, owner in seen if isinstance(owner, nn.Module)]
    if not layers:
        return methods[-1] if methods else "a trial with a few examples"
    place = methods[-1] if methods else "the model"
    names = {layer: name for name, layer in layers[0].named_modules()}
    name = names.get(layers[-1])
    return f"{place}, in {name} ({type(layers[-1]).__name__})" if name else place


class _Trial:
    """A workload, its new model, and its first examples."""

    def __init__(
        self, workload: Workload, train: Split, config: TrainConfig, num_workers: int, *, is_validated: bool
    ) -> None:
        self.workload, self.name, self.train, self.num_workers = workload, type(workload).__name__, train, num_workers
        self.is_validated = is_validated
        self.config = dataclasses.replace(config, precision=resolve_precision(config.precision, Group()))
        self.total_steps = config.total_steps(len(train))
        own = type(workload).create_optimizer, type(workload).create_scheduler
        is_own = own != (Workload.create_optimizer, Workload.create_scheduler)
        self.has_optimizers = is_own or "." in config.optimizer + config.lr_schedule

    def run(self, batch_sizes: Sequence[int], part: Fraction) -> None:
        """Try everything. Raises like ``try_batch``, but any error in the user's code as it is."""
        self.check_callbacks()
        one = self.examples(1)
        picture_of(self.workload, one[0][0])
        self.model = self.new_model(self.config.seed)
        if sharding.is_wanted(self.config, self.num_workers):
            sharding.units_of(self.workload, self.model)
        batch = self.batch(one)
        with evaluating(self.model):
            seconds = timeit.repeat(lambda: forward(self.workload, self.model, batch), number=1, repeat=2)
        number = int(_MAX_S / _NUM_PASSES / min(seconds))  # the first pass also warms up
        is_slow = number < 2
        self.few = self.examples(min(max(2, number), NUM_EXAMPLES, len(self.train)))
        self.check_outputs()
        evaluation = self.evaluated(self.few)
        self.check_evaluation(evaluation)
        if not (is_slow or self.workload.compares_examples):
            self.check_independence(evaluation)
        state = self.trained(1 if is_slow else min(2, self.total_steps))
        if not is_slow:
            self.check_checkpoint(state)
            for size in batch_sizes:
                self.try_smallest(state, size, part)

    # --- real steps and evaluations

    def examples(self, number: int) -> Split:
        """Return the first and the last examples, each of which is read only once, and as often as the others."""
        first = np.arange(number - number // 2)
        few = self.train.take(np.append(first, np.arange(len(self.train) - number // 2, len(self.train))))
        few = dataclasses.replace(few, weights=None)
        if isinstance(few.examples, Arrays) and not few.transforms:
            return few
        seed_generators(self.config.seed)
        if isinstance(few.examples, Blocks) and not few.transforms:
            blocks = copy.copy(few.examples)
            vars(blocks)["read"] = functools.cache(blocks.read)
            return dataclasses.replace(few, examples=blocks)
        read = {int(index): few[position] for position, index in enumerate(few.all_indices)}
        return dataclasses.replace(few, examples=read, indices=few.all_indices, transforms=(), is_copied=False)

    def batch(self, split: Split) -> MicroBatch:
        """Return all examples of a split as a batch."""
        batches = Batches(split, torch.device("cpu"), self.workload.collate)
        return batches[Request(np.arange(len(split)), len(split))]

    def new_model(self, seed: int) -> nn.Module:
        """Return a new model that can be trained and saved."""
        model: Any = seeded_model(self.workload, seed)
        where = f"{self.name}.create_model"
        if not isinstance(model, nn.Module):
            raise UsageError(f"{where} returned {type(model).__name__}, not a torch.nn.Module")
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
            raise UsageError(f"{where}: a lazy layer has no shape yet", fix="first call the model on an example")
        for key, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                problem = f"{where}: the state_dict holds {key}, of type {type(value).__name__}"
                raise UsageError(problem, fix="a checkpoint keeps only tensors: use a buffer or a setting")
        check_held(model.state_dict())
        if odd := [key for key, value in model.named_parameters() if not value.isfinite().all()]:
            raise UsageError(f"{where}: the parameter {odd[0]} is not finite", fix="if it is a mask, make it a buffer")
        return model

    def evaluated(self, split: Split, model: nn.Module | None = None) -> Evaluation:
        """Evaluate a model: the trial's, unless another one is given."""
        return evaluate(self.workload, model or self.model, split, self.config)

    def trained(self, num_steps: int) -> TrainingState:
        """Return the state after steps on the few examples."""
        still: Any = _Still(self.model)
        state = TrainingState(self.model, {"": still}, {}, steps_per_epoch=1, total_steps=num_steps)
        one_batch: Any = {"batch_size": len(self.few), "num_epochs": num_steps, "num_steps": None}
        plain: Any = {"validate_every": None, "reproducible": False, "compile": False, "ema_decay": None}
        self.config = dataclasses.replace(self.config, **one_batch, **plain)
        if self.has_optimizers:
            created = create_optimizers(self.workload, self.model, self.config, self.total_steps)
            state.optimizers, state.schedulers = created
            self.check_schedules(state)
        parameters = {key: value for key, value in self.model.named_parameters() if value.requires_grad}
        with_gradient = set[Tensor]()
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(with_gradient.add)
        try:
            Trainer(self.workload, state, self.few, self.config, Group()).train()
        except TrainingDivergedError as error:
            when = "with the initial weights" if state.epoch == 0 else "after a step; lower --learning-rate"
            raise UsageError(f"{self.name}.loss is not finite on {len(self.few)} examples {when}") from error
        idle = [key for key, value in parameters.items() if value not in with_gradient]
        if idle and not self.workload.has_unused_parameters:
            others = f", nor {count(len(idle) - 1, 'other')}" if len(idle) > 1 else ""
            fix = "remove or freeze them; if other steps use them, set has_unused_parameters = True"
            raise UsageError(f"{self.name}: the parameter {idle[0]} is not part of the loss{others}", fix=fix)
        return state

    def try_smallest(self, state: TrainingState, batch_size: int, part: Fraction) -> None:
        """Take a step with as few examples as a worker may compute at a time: batch normalization may need more."""
        micro_batch_size = self.config.micro_batch_size
        share = int((len(self.train) % batch_size or batch_size) * part)
        smallest = max(1, share // max(1, math.ceil(share / (micro_batch_size or batch_size))))
        if smallest >= NUM_EXAMPLES:
            return
        few = self.batch(self.examples(smallest))
        try:
            if self.workload.compares_examples:  # those of all workers
                forward(self.workload, self.model.train(), few, self.config.precision)
                return
            step = Step(self.workload, state, self.config, Group())
            with step.on([few]):
                self.workload.training_step(step)
        except Exception as error:
            problem = f"{self.name}: a worker computes only {count(smallest, 'example')} of some batches at a time"
            said = with_place(error, self.workload.source.folder)
            fix = f"choose a --batch-size other than {batch_size}"
            fix += ", or a larger --micro-batch-size" if micro_batch_size else ""
            raise UsageError(f"{problem}, too few for the model ({said})", fix=fix) from error

    # --- checks

    def check_callbacks(self) -> None:
        """Raise UsageError unless the workload's own callbacks are objects whose methods can be called."""
        for callback in copy.deepcopy([*self.workload.callbacks]):
            if not isinstance(callback, Callback):
                raise UsageError(f"{self.name}.callbacks must hold Callback objects, not {callback!r:.40}")
            check_members(type(callback), Callback)

    def check_outputs(self) -> None:
        """Compute the few examples as in training; check the outputs, and what the workload computes from them."""
        workload, batch = self.workload, self.batch(self.few)
        seed_generators(self.config.seed)
        outputs = forward(workload, self.model.train(), batch, self.config.precision, torch.default_generator)
        workload.check_outputs(outputs, batch.targets)
        self.check_weights(workload.weights(batch.targets))
        columns = workload.predictions(detached(outputs), batch.targets)
        self.check_dict("measure", workload.measure(detached(outputs), batch.targets), {"loss", WEIGHT})
        self.check_dict("predictions", columns, {*NOT_PREDICTED})
        for key, values in columns.items():
            if not isinstance(values, Tensor) or values.shape[:1] != (batch.num_examples,):
                wanted = f"a tensor with {batch.num_examples} examples, (N, ...)"
                raise UsageError(f"{self.name}.predictions: {key} must be {wanted}")
        if workload.compares_examples:
            self.check_rows(outputs)

    def check_weights(self, weights: Any) -> None:
        """Raise UsageError if examples' weights are unusable, or the loss does not multiply by them."""
        if weights is None:
            return
        check_per_example(f"{self.name}.weights", weights, len(self.few))
        if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise UsageError(f"{self.name}.weights must be finite numbers from 0, not all of them 0")
        if type(self.workload).loss in (Classification.loss, Regression.loss):
            problem = f"{self.name} has weights, so it needs a loss that multiplies by them"
            raise UsageError(problem, fix="return super().loss(outputs, targets) * self.weights(targets)")

    def check_rows(self, outputs: Any) -> None:
        """Raise UsageError unless each output has a row per example, or is one for any batch, like a temperature."""
        number, fewer = len(self.few), len(self.few) // 2
        few = forward(self.workload, self.model, self.batch(self.few.take(slice(fewer))), self.config.precision)
        for leaf, of_few in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(few), strict=False):
            if not isinstance(leaf, Tensor):
                continue
            has_rows = leaf.shape[:1] == (number,) and of_few.shape == (fewer, *leaf.shape[1:])
            if not has_rows and (leaf.numel() > 1 or not torch.equal(leaf, of_few)):
                shapes = f"{tuple(leaf.shape)} for {number} examples and {tuple(of_few.shape)} for {fewer}"
                fix = "with compares_examples, return a row per example, such as its views (N, 2, …), or one number"
                raise UsageError(f"{self.name}: an output is {shapes}", fix=fix)

    def check_evaluation(self, evaluation: Evaluation) -> None:
        """Raise UsageError unless the workload makes of an evaluation the metrics that it names."""
        workload, columns, sums = self.workload, evaluation.columns, _sums_of(evaluation)
        weight = sums.pop(WEIGHT, evaluation.num_examples)
        means = {name: value / weight for name, value in sums.items() if name != "loss"}
        found = dict[str, Any]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few examples may lack some class
            found |= self.check_dict("summarize", workload.summarize(means))
            found |= self.check_dict("summarize_predictions", workload.summarize_predictions(columns))
            workload.lines(columns)
            with placed(workload, "details"):
                json.dumps(workload.details(columns))
        for key, value in found.items():
            if not isinstance(value, (int, float, np.number, Tensor)):
                raise UsageError(f"{self.name}: metric {key} is {value!r:.40}, not a number")
        named = [metric.name for metric in workload.all_metrics[1:]]  # without the loss
        if sorted(found) != sorted(named):
            returned = f"{self.name}.summarize and summarize_predictions return {', '.join(found) or 'nothing'}"
            raise UsageError(f"{returned}, but {self.name}.metrics names {', '.join(named) or 'none'}")

    def check_dict(self, method: str, values: Any, taken: Collection[str] = ()) -> dict[str, Any]:
        """Return what a method has returned. Raises UsageError unless it is a dict without the names ``taken``."""
        if not isinstance(values, dict):
            raise UsageError(f"{self.name}.{method} returned {type(values).__name__}, not a dict")
        if both := values.keys() & {*taken}:
            raise UsageError(f"{self.name}.{method}: {min(both)} has another meaning", fix="choose another name")
        return values

    def check_independence(self, evaluation: Evaluation) -> None:
        """Raise UsageError if an example's loss or measure changes if the batch has other examples, or none."""
        cuts = [0, 1, len(self.few) // 2 + 1, len(self.few)]
        parts = [self.few.take(slice(*ends)) for ends in itertools.pairwise(cuts)]
        in_parts = Evaluation.merge([self.evaluated(part) for part in parts if len(part)])
        changed = _differing(evaluation, in_parts)
        if changed and not _differing(evaluation, self.evaluated(self.few)):  # else, it changes anyway
            name = "loss" if "loss" in changed else min(changed)
            problem = f"{self.name}: an example's {name} changes if other examples leave the batch"
            fix = "mask the padding, compute it in summarize_predictions, or set compares_examples = True if intended"
            raise UsageError(f"{problem}, so it depends on the number of workers", fix=fix)

    def check_schedules(self, state: TrainingState) -> None:
        """Raise UsageError if a schedule looks at a validation that there is none of, or takes better for worse."""
        monitor = self.workload.monitor
        plateaus = [schedule for schedule in state.schedulers.values() if isinstance(schedule, ReduceLROnPlateau)]
        if plateaus and not self.is_validated:
            problem = f"{self.name}: ReduceLROnPlateau looks at the validation, but there is none"
            raise UsageError(problem, fix="leave --validation-size 0 and --overfit-batches out")
        for schedule in plateaus:
            if schedule.mode != monitor.mode:
                problem = f"{self.name}: ReduceLROnPlateau has mode={schedule.mode!r}, but looks at {monitor.name}"
                raise UsageError(problem, fix=f"create it with mode={monitor.mode!r}")

    def check_checkpoint(self, state: TrainingState) -> None:
        """Raise UsageError if a checkpoint cannot hold the state, or another model computes something else with it."""
        if self.has_optimizers:
            with placed(self.workload, "a checkpoint of optimizer and schedule"):
                check_kept(snapshot(state, {}).training, f"{self.name}: a state_dict of optimizer or schedule")
        again = self.new_model(self.config.seed + 1)  # an evaluation has another seed, too
        again.load_state_dict(self.model.state_dict())
        evaluation = self.evaluated(self.few)
        is_other = _differing(evaluation, self.evaluated(self.few, again))
        if is_other and not _differing(evaluation, self.evaluated(self.few)):
            problem = f"{self.name}: another new model computes something else with the same state_dict"
            raise UsageError(problem, fix="make random tensors buffers, and keep layers in an nn.ModuleList")


class _Still:
    """Stands in for a default optimizer, whose import takes most of a second. It moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": [*model.parameters()], "lr": 0.0}]

    def step(self, closure: Callable[[], object] = lambda: None) -> None:
        """Only compute the gradients that a closure computes."""
        closure()


def _differing(one: Evaluation, other: Evaluation) -> set[str]:
    """Return the names of the losses and sums that differ between evaluations of the same examples."""
    are_close = functools.partial(np.allclose, rtol=1e-3, atol=1e-5, equal_nan=True)
    of_other = _sums_of(other)
    found = {name for name, value in _sums_of(one).items() if not are_close(value, of_other[name])}
    return found if are_close(one.losses["loss"], other.losses["loss"]) else {*found, "loss"}


def _sums_of(evaluation: Evaluation) -> dict[str, float]:
    """Return the sums of loss, measures and weights over all examples."""
    return {name: sum(batch[name] for batch in evaluation.batch_sums) for name in evaluation.batch_sums[0]}


def notes_of_transforms(workload: Workload, validation: Split) -> list[str]:
    """Return a note if the validation set is held out from a ``Dataset`` whose examples change from read to read."""
    is_plain = isinstance(validation.examples, Arrays) and not validation.transforms
    if validation.origin != "train" or validation.is_in_blocks or is_plain:
        return []
    read = list[list[Any]]()
    for seed in (0, 1):  # of the random numbers that examples draw
        seed_generators(seed)
        with placed(workload, "an example for validation"):
            examples = [validation[position] for position in range(min(_NUM_REREAD, len(validation)))]
        arrays = map(np.asarray, pytree.tree_leaves(examples))
        read.append([np.nan_to_num(array) for array in arrays if array.dtype.kind in "biuf"])
    if len(read[0]) == len(read[1]) and all(map(np.array_equal, *read)):
        return []
    problem = "the validation set is held out from a Dataset whose examples change from read to read"
    return [f"{problem}: validation gets them, too; pass random transforms as Data(train_transform=…)"]
