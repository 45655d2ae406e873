"""Steps on any number of ranks, usual ones and others: as in a loop of plain PyTorch in one process."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.data import Arrays, Split
from mnist_ray.data.sampler import ShardedBatchSampler
from mnist_ray.errors import TrainingStoppedError, UsageError
from mnist_ray.parallel import shared_memory
from mnist_ray.parallel.group import Group, of_all_ranks
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate, evaluate_together
from mnist_ray.training.events import Progress, figures_of
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import TrainingState
from mnist_ray.training.step import Step, seed_of
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.workload import Workload
from tests.ranks import WORLD_SIZES, Hooks, call_on_ranks, joined

NUM_EXAMPLES, NUM_STEPS = 70, 50  # 7 steps a pass; with 3 ranks, slices of 3, 3 and 4
CONFIG = TrainConfig(
    precision="fp32",
    num_epochs=1,
    num_steps=NUM_STEPS,
    validate_every=NUM_STEPS,
    batch_size=10,
    optimizer="sgd",
    learning_rate=0.05,
    lr_schedule="constant",
)


def numbers() -> Arrays:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((NUM_EXAMPLES, 6)).astype(np.float32)
    return Arrays(inputs, (inputs[:, :3].sum(1) + rng.standard_normal(NUM_EXAMPLES) * 0.1).astype(np.float32))


class Numbers(Workload):
    """Which number belongs to six others?"""

    def create_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets) ** 2


class ByAdam(Numbers):
    """With the usual eps, Adam moves a weight by a whole step where a gradient is a mere rounding error."""

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)


class AddsWeights(Callback):
    def on_gradients(self, state: TrainingState) -> None:
        add_weights_to_gradients(state.model)


class WithWeightsAdded(Numbers):
    callbacks = (AddsWeights(),)


def add_weights_to_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad += 0.1 * parameter.detach()


class ByLBFGS(Numbers):
    def create_model(self) -> nn.Module:
        return nn.Linear(6, 1)  # convex: elsewhere, LBFGS makes a rounding error grow by ten in ten steps

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=3)

    def training_step(self, step: Step) -> None:
        step.update(closure=lambda: step.backward(self.batch_loss))


class ByLoss(torch.optim.SGD):
    """The learning rate follows the loss, so all ranks must know the same loss."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.param_groups[0]["lr"] = 0.05 * min(1.0, loss.item())
        super().step()
        return loss


class ByItsLoss(Numbers):
    training_step = ByLBFGS.training_step

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return ByLoss(model.parameters(), config.learning_rate, momentum=0.9)


class Experts(nn.Module):
    """Each row goes to one of three experts; the last one gets rows in few steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        number = (inputs[:, 0] > 0).long() + (inputs[:, 0] > 1.5).long()
        outputs = inputs.new_zeros(len(inputs), 1)
        for index, expert in enumerate(self.experts):
            rows = number == index
            if rows.any():
                outputs = outputs.index_put((rows.nonzero()[:, 0],), expert(inputs[rows]))
        return outputs


class Weighted(Numbers):
    """Weights from 1 to 4: a mean of the slices' means would be far off."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * self.weights(targets)

    def weights(self, targets: Tensor) -> Tensor:
        return targets.abs().ceil().clamp(1, 4)


class OfExperts(Numbers):
    has_unused_parameters = True

    def create_model(self) -> nn.Module:
        return Experts()


class Compared(Numbers):
    """Which of the other examples has a similar number? InfoNCE with a temperature that is learned."""

    compares_examples = True

    def create_model(self) -> nn.Module:
        return Encoder()

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        features = F.normalize(outputs["features"], dim=1)
        similar = features @ features.T * outputs["scale"].exp()
        similar = similar.masked_fill(torch.eye(len(targets), dtype=torch.bool), -torch.inf)
        apart = (targets[:, None] - targets).abs() + 1e9 * torch.eye(len(targets))
        return F.cross_entropy(similar, apart.argmin(1), reduction="none")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"features": self.layer(inputs), "scale": self.scale}


class ComparedInRow(Compared):
    """The temperature has one row, like the outputs of a slice of one example."""

    def create_model(self) -> nn.Module:
        model = Encoder()
        model.scale = nn.Parameter(torch.full((1,), 0.5))
        return model


FIRST_STEP = 17


class Thaw(Callback):
    """Trains the first layer from a step on."""

    def on_start(self, state: TrainingState, group: Group) -> None:
        for name in ("0.weight", "0.bias"):
            state.model.get_parameter(name).requires_grad_(state.total_step >= FIRST_STEP)

    def on_step(self, state: TrainingState) -> None:
        self.on_start(state, Group())


class Thawing(Numbers):
    callbacks = (Thaw(),)

    def create_optimizer(self, model: Any, config: TrainConfig) -> Any:
        first, last = (layer.parameters() for layer in (model[0], model[2]))
        groups: list[dict[str, Any]] = [{"params": first, "lr": 0.02, "name": "first"}, {"params": last}]
        return torch.optim.SGD(groups, 0.05, momentum=0.9)


class ThawingByDefault(Numbers):
    """The default SGD: PyTorch's fused one fails if only some parameters have a momentum."""

    callbacks = (Thaw(),)


class Mixup(Numbers):
    """Each example is mixed with another one of its micro-batch."""

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Step) -> Tensor:
        mixed, targets = mixup(batch.inputs, batch.targets)
        return self.loss(model(mixed), targets)


def mixup(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    share, order = torch.rand(()), torch.randperm(len(inputs))
    return torch.lerp(inputs, inputs[order], share), torch.lerp(targets, targets[order], share)


class Sharpness(Numbers):
    """SAM, without an optimizer of its own: the gradient at a worse place nearby."""

    def training_step(self, step: Step) -> None:
        step.backward(self.batch_loss)
        with at_a_worse_place(step.model):
            step.backward(self.batch_loss, "loss_nearby")
        step.update()


@contextlib.contextmanager
def at_a_worse_place(model: nn.Module) -> Iterator[None]:
    parameters: list[Tensor] = [*model.parameters()]
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    moves = [p.grad * (0.05 / norm) for p in parameters if p.grad is not None]
    with torch.no_grad():
        torch._foreach_add_(parameters, moves)
    yield
    with torch.no_grad():
        torch._foreach_sub_(parameters, moves)


class Penalized(Numbers):
    """The gradient of the output with respect to the input is part of the loss."""

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Step) -> Tensor:
        inputs = batch.inputs.clone().requires_grad_()
        outputs = model(inputs)
        penalty = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0].square().sum(1)
        step.log("penalty", penalty)
        return step.measure(outputs, batch.targets) + 0.1 * penalty


class Autoencoder(nn.Module):
    """A VAE whose noise follows from the input, so that slices do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(inputs).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.sin(1000 * inputs[:, :2])
        return {"inputs": inputs, "mean": mean, "log_variance": log_variance, "decoded": self.decoder(code)}


class OfAutoencoder(Numbers):
    def create_model(self) -> nn.Module:
        return Autoencoder()

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return (outputs["decoded"] - outputs["inputs"]).square().sum(1)

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Step) -> Tensor:
        outputs = step.forward(batch)
        kl = kl_of(outputs)
        step.log("kl", kl)
        return step.measure(outputs, batch.targets) + kl


def kl_of(outputs: dict[str, Tensor]) -> Tensor:
    mean, log_variance = outputs["mean"], outputs["log_variance"]
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)


class Distilled(Numbers):
    """A frozen teacher is a part of the model."""

    def create_model(self) -> nn.Module:
        model = nn.ModuleDict({"teacher": nn.Linear(6, 1), "student": super().create_model()})
        model["teacher"].requires_grad_(False)
        model.forward = model["student"].forward  # type: ignore[method-assign]
        return model

    def batch_loss(self, model: Any, batch: MicroBatch, step: Step) -> Tensor:
        outputs = step.forward(batch)
        taught = (outputs - model["teacher"](batch.inputs))[:, 0].square()
        return step.measure(outputs, batch.targets) + 0.5 * taught


class Pair(nn.Module):
    """A generator makes a number, a discriminator judges it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(6, 1), nn.Linear(7, 1)
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        fake: Tensor = self.generator(inputs) + self.shift
        return fake


class GAN(Numbers):
    num_discriminator_steps = 1

    def create_model(self) -> nn.Module:
        return Pair()

    def create_optimizer(self, model: Any, config: TrainConfig) -> Any:
        discriminator = torch.optim.SGD(model.discriminator.parameters(), 0.02, momentum=0.9)
        return {
            "discriminator": discriminator,
            "generator": torch.optim.Adam(model.generator.parameters(), 0.01, eps=1e-4),
        }

    def training_step(self, step: Step) -> None:
        for _ in range(self.num_discriminator_steps):
            step.backward(self.discriminator_loss, "discriminator_loss", optimizer="discriminator")
            step.update("discriminator")
        step.backward(self.generator_loss, "generator_loss", optimizer="generator")
        step.update("generator")

    def generator_loss(self, model: Any, batch: MicroBatch, step: Step) -> Tensor:
        losses = step.measure(step.forward(batch), batch.targets)
        judged = model.discriminator(torch.cat([batch.inputs, model(batch.inputs)], 1))[:, 0]
        return F.softplus(-judged) + losses

    def discriminator_loss(self, model: Any, batch: MicroBatch, step: Step) -> Tensor:
        real = model.discriminator(torch.cat([batch.inputs, batch.targets[:, None]], 1))[:, 0]
        fake = model.discriminator(torch.cat([batch.inputs, model(batch.inputs).detach()], 1))[:, 0]
        return F.softplus(-real) + F.softplus(fake)


class GANOfTwoSteps(GAN):
    num_discriminator_steps = 2


class UnseededGAN(GAN):
    def create_model(self) -> nn.Module:
        model = Pair()
        if dist.is_initialized() and dist.get_rank():  # as if drawn with NumPy, whose seed the ranks do not share
            nn.init.zeros_(model.generator.weight)
            model.get_buffer("shift").fill_(1)
        return model


CASES: dict[str, tuple[type[Workload], dict[str, Any]]] = {
    "plain": (Numbers, {"momentum": 0.9}),
    "plain, by gloo": (Numbers, {}),
    "some slices empty": (Numbers, {"batch_size": 2, "learning_rate": 0.002}),
    "a smaller last batch": (Numbers, {"batch_size": 16}),
    "micro-batches": (Numbers, {"batch_size": 16, "micro_batch_size": 3}),
    "micro-batches, by gloo": (Numbers, {"batch_size": 16, "micro_batch_size": 3}),
    "clipped": (Numbers, {"clip_grad_norm": 0.2, "micro_batch_size": 5}),
    "changed gradients": (WithWeightsAdded, {}),
    "Adam in micro-batches": (ByAdam, {"micro_batch_size": 2}),
    "LBFGS": (ByLBFGS, {"batch_size": NUM_EXAMPLES}),
    "LBFGS in chunks": (ByLBFGS, {"batch_size": NUM_EXAMPLES, "reproducible": True, "num_chunks": 3}),
    "a closure's loss": (ByItsLoss, {"clip_grad_norm": 10.0}),
    "experts": (OfExperts, {"momentum": 0.9}),
    "experts in micro-batches": (OfExperts, {"micro_batch_size": 2}),
    "experts in chunks": (OfExperts, {"reproducible": True, "num_chunks": 4}),
    "weights": (Weighted, {}),
    "weights in micro-batches": (Weighted, {"micro_batch_size": 2}),
    "weights, clipped": (Weighted, {"clip_grad_norm": 0.05}),
    "weights in chunks": (Weighted, {"reproducible": True, "num_chunks": 3}),
    "whole batch": (Compared, {}),
    "whole batch, slices of one and two": (ComparedInRow, {"batch_size": 5}),
    "SAM": (Sharpness, {}),
    "SAM in chunks": (Sharpness, {"reproducible": True, "num_chunks": 4}),
    "gradient penalty": (Penalized, {}),
    "VAE": (OfAutoencoder, {"clip_grad_norm": 1.0}),
    "VAE in chunks": (OfAutoencoder, {"reproducible": True, "num_chunks": 4}),
    "distillation": (Distilled, {"micro_batch_size": 2}),
    "thawing": (Thawing, {"clip_grad_norm": 1.0}),
    "thawing by default": (ThawingByDefault, {"momentum": 0.9}),
    "thawing in chunks": (Thawing, {"reproducible": True, "num_chunks": 4}),
    "GAN": (GAN, {}),
    "GAN in micro-batches": (GAN, {"micro_batch_size": 2, "ema_decay": 0.5}),
    "GAN in chunks": (GAN, {"reproducible": True, "num_chunks": 4}),
    "GAN of two steps": (GANOfTwoSteps, {}),
    "GAN, unseeded": (UnseededGAN, {}),
    "GAN, unseeded in chunks": (UnseededGAN, {"reproducible": True, "num_chunks": 4}),
}


def train_cases(rank: int, folder: Path) -> None:
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        with joined(rank, world_size, folder / f"store-{world_size}") as group:
            for case, (workload_class, settings) in CASES.items():
                workload, config, losses = workload_class(), replace(CONFIG, **settings), list[float]()
                state = create_state(workload, config, NUM_EXAMPLES, group)
                note = Hooks(on_progress=lambda state, progress, losses=losses: losses.extend(progress.losses))
                of_epoch = list[Any]()
                end = Hooks(on_epoch=lambda state, progress, seen=of_epoch: seen.append(progress))
                own: list[Any] = [*workload.callbacks, note, end]
                without_memory = mock.patch.object(shared_memory, "open_together", return_value=None)
                with without_memory if "gloo" in case else contextlib.nullcontext():
                    Trainer(workload, state, Split(numbers()), config, group, own).train()
                check_evaluation(workload, state, config, group)
                logged = {"loss": of_epoch[0].so_far["loss"], **of_epoch[0].logged}
                if rank == 0:
                    (folder / f"{case}-{world_size}.json").write_text(json.dumps(losses))
                    (folder / f"{case}-{world_size}-logged.json").write_text(json.dumps(logged))


def check_evaluation(workload: Workload, state: TrainingState, config: TrainConfig, group: Group) -> None:
    """Ranks together evaluate as one rank does, to the bit, in batches of 10."""
    split, config = Split(numbers()), replace(config, micro_batch_size=10)
    together = evaluate_together(workload, state.result, split, config, group)
    alone = evaluate(workload, state.result, split, config)
    assert together.batch_sums == alone.batch_sums
    assert all(np.array_equal(together.columns[name], values) for name, values in alone.columns.items())


@pytest.fixture(scope="module")
def runs(ranks: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    call_on_ranks(ranks, train_cases, folder)
    return folder


def batches(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    examples = numbers()
    for number in range(NUM_STEPS):
        pass_number, step = divmod(number, math.ceil(NUM_EXAMPLES / batch_size))
        sampler = ShardedBatchSampler(NUM_EXAMPLES, batch_size, CONFIG.seed, pass_number, first_step=step)
        indices = next(iter(sampler)).indices
        yield torch.tensor(examples.inputs[indices]), torch.tensor(examples.targets[indices])


def train_plainly(case: str) -> list[float]:
    """Return the losses of a loop of plain PyTorch, as its user would write it."""
    workload_class, settings = CASES[case]
    workload, config = workload_class(), replace(CONFIG, **settings)
    torch.manual_seed(config.seed)
    model, losses = workload.create_model(), []
    optimizer: Any = workload.create_optimizer(model, config)
    for number, (inputs, targets) in enumerate(batches(config.batch_size)):
        if Thaw in map(type, workload.callbacks):
            next(model.children()).requires_grad_(number >= FIRST_STEP)
        losses.append(step_plainly(workload, model, optimizer, inputs, targets, config.clip_grad_norm))
    return losses


def step_plainly(
    workload: Workload, model: Any, optimizer: Any, inputs: Tensor, targets: Tensor, max_norm: float | None
) -> float:
    """Take a step; return the loss that is reported."""
    reported, weights = list[float](), workload.weights(targets)
    total_weight = float(len(targets) if weights is None else weights.sum())

    def backward(minimized: Callable[[Any], Tensor] = lambda outputs: workload.loss(outputs, targets)) -> Tensor:
        model.zero_grad()
        outputs = model(inputs)
        loss = minimized(outputs).sum() / total_weight
        loss.backward()  # type: ignore[no-untyped-call]
        reported.append(workload.loss(outputs, targets).sum().item() / total_weight)
        return loss

    def discriminated(values: Tensor) -> Tensor:
        judged: Tensor = model.discriminator(torch.cat([inputs, values], 1))[:, 0]
        return judged

    match workload:
        case ByLBFGS() | ByItsLoss():
            optimizer.step(backward)
            return reported[0]
        case GAN():
            for _ in range(workload.num_discriminator_steps):
                model.zero_grad()
                losses = F.softplus(-discriminated(targets[:, None])) + F.softplus(
                    discriminated(model(inputs).detach())
                )
                losses.mean().backward()  # type: ignore[no-untyped-call]
                optimizer["discriminator"].step()
            backward(lambda outputs: F.softplus(-discriminated(outputs)) + workload.loss(outputs, targets))
            optimizer["generator"].step()
            return reported[0]
        case Sharpness():
            backward()
            with at_a_worse_place(model):
                backward()
        case Penalized():
            inputs.requires_grad_()

            def penalized(outputs: Tensor) -> Tensor:
                slope = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0]
                return workload.loss(outputs, targets) + 0.1 * slope.square().sum(1)

            backward(penalized)
        case OfAutoencoder():
            backward(lambda outputs: workload.loss(outputs, targets) + kl_of(outputs))
        case Distilled():
            taught = model["teacher"](inputs)
            backward(lambda outputs: workload.loss(outputs, targets) + 0.5 * (outputs - taught)[:, 0].square())
        case _:
            backward()
    if isinstance(workload, WithWeightsAdded):
        add_weights_to_gradients(model)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return reported[0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_plain_loop(runs: Path, case: str, world_size: int) -> None:
    losses, expected = json.loads((runs / f"{case}-{world_size}.json").read_text()), train_plainly(case)
    assert len(losses) == NUM_STEPS
    assert losses[0] == pytest.approx(expected[0], rel=2e-6)
    assert losses == pytest.approx(expected, rel=1e-3 if "LBFGS" in case else 1e-5)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("case", ["gradient penalty", "VAE", "VAE in chunks", "GAN"])
def test_logged_means_are_those_of_all_examples_on_any_number_of_ranks(runs: Path, case: str) -> None:
    names = {"gr": ["penalty"], "VA": ["kl"], "GA": ["discriminator_loss", "generator_loss"]}[case[:2]]
    found = [json.loads((runs / f"{case}-{world_size}-logged.json").read_text()) for world_size in WORLD_SIZES]
    assert {*found[0]} == {"loss", *names} | ({"minimized_loss"} if not case.startswith("GAN") else set())
    for logged in found[1:]:
        assert logged == (found[0] if "chunks" in case else pytest.approx(found[0], rel=1e-5))
    if not case.startswith("GAN"):
        factor = 0.1 if names == ["penalty"] else 1
        assert found[0]["minimized_loss"] == pytest.approx(found[0]["loss"] + factor * found[0][names[0]], rel=1e-5)


class Late(Numbers):
    """Some ranks log a value in some steps; all log a number outside of losses."""

    def training_step(self, step: Step) -> None:
        super().training_step(step)
        step.log("twice", 2.0)

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Step) -> Tensor:
        if (rows := batch.inputs[:, 0] > 1).any():
            step.log("large", torch.where(rows, batch.inputs[:, 0], 1.0))
        return super().batch_loss(model, batch, step)


def log_late(rank: int, folder: Path) -> None:
    note = Hooks(on_step=lambda state: state.log("number", state.step % 2))
    config = replace(CONFIG, micro_batch_size=1, num_steps=7, validate_every=7)  # all examples once
    large = numbers().inputs[:, 0]
    for world_size in WORLD_SIZES:
        if rank < world_size:
            with joined(rank, world_size, folder / f"late-{world_size}") as group:
                last = list[Any]()
                seen = Hooks(on_epoch=lambda state, progress, last=last: last.append(progress.logged))
                state = create_state(Late(), config, NUM_EXAMPLES, group)
                Trainer(Late(), state, Split(numbers()), config, group, [note, seen]).train()
                assert last[0] == pytest.approx({"twice": 2, "number": 4 / 7, "large": large[large > 1].mean()})


def test_values_that_some_ranks_log_are_averaged_over_those_who_have_them(
    ranks: ProcessPoolExecutor, tmp_path: Path
) -> None:
    call_on_ranks(ranks, log_late, tmp_path)


class Undeclared(OfExperts):
    """All rows go to the first expert."""

    has_unused_parameters = False

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return inputs.clamp(max=0)


def train_undeclared(rank: int, folder: Path) -> None:
    if rank < 2:
        with joined(rank, 2, folder / "undeclared") as group:
            problem = "some parameters had no gradient in the last step; set has_unused_parameters = True"
            state = create_state(Undeclared(), CONFIG, NUM_EXAMPLES, group)
            with pytest.raises(TrainingStoppedError, match=f"^{problem}"):
                Trainer(Undeclared(), state, Split(numbers()), CONFIG, group).train()


def test_parameters_without_gradients_are_one_line_on_several_ranks(ranks: ProcessPoolExecutor, tmp_path: Path) -> None:
    call_on_ranks(ranks, train_undeclared, tmp_path)


@pytest.mark.parametrize("name", ["learning_rate", "train_loss", "val_mine", "step", "a, b"])
def test_a_value_cannot_be_logged_by_a_name_with_another_meaning(name: str) -> None:
    note = Hooks(on_step=lambda state: state.log(name, 1.0))
    with pytest.raises(UsageError, match=f"^Numbers: '{name}' cannot be logged; choose another name$"):
        trained(Numbers(), note)


def test_mixed_examples_are_those_of_a_plain_loop_in_one_process() -> None:
    losses = list[float]()
    trained(Mixup(), Hooks(on_progress=lambda state, progress: losses.extend(progress.losses)))
    torch.manual_seed(CONFIG.seed)
    workload, expected = Mixup(), list[float]()
    model = workload.create_model()
    optimizer: Any = workload.create_optimizer(model, CONFIG)
    for number, (inputs, targets) in enumerate(batches(CONFIG.batch_size)):
        torch.manual_seed(seed_of(CONFIG.seed, 0, 0) + number)
        mixed, mixed_targets = mixup(inputs, targets)
        model.zero_grad()
        loss = workload.loss(model(mixed), mixed_targets).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)


def trained(workload: Workload, *callbacks: Callback, config: TrainConfig = CONFIG) -> TrainingState:
    """Train a workload in this process."""
    state = create_state(workload, config, NUM_EXAMPLES, Group())
    Trainer(workload, state, Split(numbers()), config, Group(), callbacks).train()
    return state


@pytest.mark.parametrize("kind", [Numbers, GAN])
@pytest.mark.parametrize("clip_grad_norm", [None, 0.2])
def test_progress_has_the_largest_gradient_norm_before_clipping(
    kind: type[Workload], clip_grad_norm: float | None
) -> None:
    norms, found, expected = list[float](), list[float | None](), list[float | None]()

    def note(state: TrainingState) -> None:
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients).item())

    def compare(state: TrainingState, progress: Progress) -> None:
        found.append(figures_of(progress).get("gradient_norm"))
        expected.append(max(norms) if clip_grad_norm else None)
        norms.clear()

    config = replace(CONFIG, clip_grad_norm=clip_grad_norm)
    trained(kind(), Hooks(on_gradients=note, on_progress=compare), config=config)
    assert found == expected


class WithConvolutions(ByLBFGS):
    def create_model(self) -> nn.Module:
        layers = nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2)
        return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers, nn.Flatten(), nn.Linear(24, 1))


def test_lbfgs_trains_convolutions_whose_layout_would_be_another() -> None:
    state = trained(WithConvolutions())
    assert all(parameter.is_contiguous() for parameter in state.model.parameters())
    assert state.total_step == NUM_STEPS


def test_of_several_optimizers_one_is_frozen_where_a_callback_sees_the_gradients() -> None:
    seen = list[bool]()

    def freeze(state: TrainingState) -> None:
        seen.append(state.model.get_parameter("discriminator.bias").requires_grad)
        state.model.get_parameter("generator.bias").requires_grad_(False)

    state = trained(GAN(), Hooks(on_gradients=freeze))
    assert all(seen), "also while the other part's gradient is computed"
    assert not state.model.get_parameter("generator.bias").requires_grad


def test_a_callback_that_asks_for_the_only_one_of_several_optimizers_is_one_line() -> None:
    with pytest.raises(TrainingStoppedError, match=r"^the run has several optimizers; choose one of state\.optimizers"):
        trained(GAN(), Hooks(on_step=lambda state: state.optimizer))


class Unlabelled(Numbers):
    """The loss leaves out examples without a label; the first ones have theirs."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets)[targets > -100]


def test_a_loss_without_a_number_for_each_example_ends_the_training_and_an_evaluation() -> None:
    examples = numbers()
    examples.targets[-20:] = -100
    workload, config = Unlabelled(), replace(CONFIG, batch_size=NUM_EXAMPLES, num_steps=1)
    state = create_state(workload, config, NUM_EXAMPLES, Group())
    message = r"^Unlabelled\.loss must be one number per example, \(70,\) here, not \(50,\)"
    with pytest.raises(UsageError, match=message):
        Trainer(workload, state, Split(examples), config, Group()).train()
    with pytest.raises(UsageError, match=message):
        evaluate(workload, state.model, Split(examples), config)


def gather(rank: int, folder: Path) -> None:
    for world_size in WORLD_SIZES[1:]:
        if rank < world_size:
            with joined(rank, world_size, folder / f"store-{world_size}") as group:
                for dtype in (torch.int16, torch.bool, torch.bfloat16):
                    own = torch.full((rank + 1, 2), rank, dtype=dtype)
                    whole, _, rows = of_all_ranks(own, own, group, rank + 1, is_filler=False)
                    assert torch.equal(whole[rows], own)
                    assert len(whole) == sum(range(1, world_size + 1))


def test_tensors_of_any_type_are_gathered(ranks: ProcessPoolExecutor, tmp_path: Path) -> None:
    call_on_ranks(ranks, gather, tmp_path)


class Weightless(Numbers):
    def weights(self, targets: Tensor) -> Tensor:
        return torch.zeros_like(targets)


class WeightlessByLoss(Weightless, ByItsLoss):
    """Its optimizer reads the loss."""


def test_nothing_is_learned_from_batches_without_weight() -> None:
    for kind in (WeightlessByLoss, Weightless):
        state = create_state(kind(), CONFIG, NUM_EXAMPLES, Group())
        before = [parameter.clone() for parameter in state.model.parameters()]
        Trainer(kind(), state, Split(numbers()), CONFIG, Group()).train()
        assert all(map(torch.equal, before, state.model.parameters()))


class NotFinite(Numbers):
    """fp16's scaler skips every step."""

    def batch_loss(self, model: nn.Module, batch: MicroBatch, step: Step) -> Tensor:
        outputs = step.forward(batch)
        return step.measure(outputs, batch.targets) + (outputs[:, 0] * 0).sqrt()  # the root's gradient at 0 is infinite


def test_a_run_in_fp16_whose_steps_are_all_skipped_has_diverged() -> None:
    with pytest.raises(TrainingDivergedError):
        trained(NotFinite(), config=replace(CONFIG, precision="fp16"))
