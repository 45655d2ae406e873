import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_ray.config import TrainConfig
from mnist_ray.data.batches import MicroBatch
from mnist_ray.data.data import Arrays, Split
from mnist_ray.mnist import MNIST
from mnist_ray.parallel.group import Group, resolve_precision
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate, evaluate_together
from mnist_ray.training.events import Progress
from mnist_ray.training.metrics import TrainingDivergedError
from mnist_ray.training.state import StopWantedError, TrainingState
from mnist_ray.training.step import Step
from mnist_ray.training.trainer import Trainer, create_state
from mnist_ray.training.window import LoggingWindow
from mnist_ray.workload import Regression
from tests.conftest import mnist
from tests.ranks import WORLD_SIZES, Hooks, call_on_ranks, joined

CONFIG = TrainConfig(
    precision="fp32", num_epochs=1, batch_size=20, learning_rate=2e-3, lr_schedule="one-cycle", validation_size=0
)


def trained(config: TrainConfig, split: Arrays, *callbacks: Callback) -> TrainingState:
    state = create_state(mnist(), config, len(split), Group())
    Trainer(mnist(), state, Split(split), config, Group(), callbacks).train()
    return state


def weights_after(config: TrainConfig, split: Arrays, *callbacks: Callback) -> dict[str, torch.Tensor]:
    return trained(config, split, *callbacks).model.state_dict()


def plain_results(images: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the untrained model's logits and the labels of all images."""
    model = create_state(mnist(), CONFIG, len(images), Group()).model
    return model(mnist().prepare(torch.tensor(images.inputs), None)), torch.tensor(images.targets).long()


def largest_difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


# --- several processes ---


def check_buffers(group: Group, split: Split) -> None:
    """All ranks evaluate with rank 0's running statistics."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(784)
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(784, 10))
    expected = evaluate(mnist(), model, split, CONFIG)
    norm.get_buffer("running_mean").add_(group.rank)
    assert evaluate_together(mnist(), model, split, CONFIG, group).batch_sums == expected.batch_sums


def check_clocks(group: Group) -> None:
    """All ranks close the next window at the same step, although one rank's clock is slow."""
    state, step = create_state(mnist(), CONFIG, 600, Group()), {"loss": torch.zeros(())}
    now, number = [0.0], 0
    with mock.patch("mnist_ray.training.window.time", mock.Mock(perf_counter=lambda: now[0])):
        window = LoggingWindow(mnist(), state, CONFIG, group)
        now[0] = 0.1 / (1 + group.rank)
        window.add(step, 20, None)
        window.close(callbacks=())
    state.step = 1
    while not window.is_due():
        window.add(step, 20, None)
        number += 1
    assert number == 5, "half a second by rank 0's clock"


def check_ranks(rank: int, images: Arrays, folder: Path) -> None:
    for world_size in WORLD_SIZES[1:]:
        if rank < world_size:
            with joined(rank, world_size, folder / f"store-{world_size}") as group:
                check_buffers(group, Split(images))
                check_clocks(group)


def test_all_ranks_use_the_buffers_and_the_clock_of_the_first(
    ranks: ProcessPoolExecutor, few_images: Arrays, tmp_path: Path
) -> None:
    call_on_ranks(ranks, check_ranks, few_images, tmp_path)


# --- one process ---


class Odd(nn.Module):
    """A model with all that an average has to treat: weights, buffers, and parameters that are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.Linear(20, 10))
        self.count = nn.Parameter(torch.tensor(0), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        outputs: torch.Tensor = self.layers(images)
        return outputs


def test_the_ema_is_that_of_torch_and_whole_numbers_are_copied(
    few_images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "create_model", lambda workload: Odd())
    averages: list[AveragedModel] = []

    def average(state: TrainingState) -> None:
        if not averages:
            averaging = get_ema_multi_avg_fn(0.8)  # type: ignore[no-untyped-call]
            averages.append(AveragedModel(state.model.layers, multi_avg_fn=averaging))  # type: ignore[arg-type]
        averages[0].update_parameters(state.model.layers)  # type: ignore[arg-type]

    state = trained(replace(CONFIG, ema_decay=0.8), few_images, Hooks(on_step=average))
    expected = averages[0].module.state_dict()
    found = state.result.state_dict()
    assert all(torch.equal(found[f"layers.{name}"], value) for name, value in expected.items())
    assert found["count"] == state.step + 600 // 20


def test_a_filler_adds_neither_to_gradients_nor_to_sums(few_images: Arrays) -> None:
    state, image = create_state(mnist(), CONFIG, 1, Group()), torch.tensor(few_images.inputs[:1])
    filler = MicroBatch(image, torch.tensor(few_images.targets[:1]), 1, global_size=20, is_filler=True)
    step, workload = Step(mnist(), state, CONFIG, Group()), mnist()
    with step.on([filler]):
        step.backward(workload.batch_loss)
        assert not any(parameter.grad.any() for parameter in state.model.parameters() if parameter.grad is not None)
    assert {*step.sums} >= {"loss", "accuracy"}
    assert not any(step.sums.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_on_one_batch(few_images: Arrays, precision: Any) -> None:
    config = replace(CONFIG, num_epochs=40, batch_size=30, precision=precision)
    losses: list[float] = []
    hooks = Hooks(on_progress=lambda state, progress: losses.extend(progress.losses))
    weights_after(config, Arrays(few_images.inputs[:30], few_images.targets[:30]), hooks)
    assert len(losses) == 40
    assert losses[0] > 2.2
    assert losses[-1] < 0.5


def test_prepare_computes_in_full_precision_in_training_too(few_images: Arrays) -> None:
    class Products(MNIST):
        def prepare(self, inputs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            products = super().prepare(inputs, generator) @ torch.eye(28)  # autocast would round them
            dtypes.add((products.dtype, generator is None))
            return products

    dtypes, workload, split = set[tuple[torch.dtype, bool]](), Products(metadata=mnist().metadata), Split(few_images)
    config = replace(CONFIG, precision="bf16", batch_size=300)
    state = create_state(workload, config, len(split), Group())
    Trainer(workload, state, split, config, Group()).train()
    evaluate(workload, state.model, split, config)
    assert dtypes == {(torch.float32, False), (torch.float32, True)}


@pytest.mark.long
def test_a_compiled_model_learns_the_same(few_images: Arrays) -> None:
    compiled = weights_after(replace(CONFIG, compile=True), few_images)
    assert largest_difference(compiled, weights_after(CONFIG, few_images)) < 1e-3


def test_progress_agrees_with_a_plain_computation(few_images: Arrays) -> None:
    """Without learning, an epoch's sums are those of the initial weights over all images."""
    config = replace(CONFIG, batch_size=1, learning_rate=1e-30)
    seen: list[Progress] = []
    weights_after(config, few_images, Hooks(on_progress=lambda state, progress: seen.append(progress)))
    (logits, labels), so_far = plain_results(few_images), seen[-1].so_far
    assert seen[-1].num_examples == 600
    assert so_far["accuracy"] == (logits.argmax(1) == labels).sum().item() / 600
    assert so_far["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len(seen) > 1
    assert [progress.step for progress in seen] == np.cumsum([len(progress.losses) for progress in seen]).tolist()
    assert seen[-1].step == seen[-1].epoch_steps == 600


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(few_images: Arrays) -> None:
    weights = [weights_after(replace(CONFIG, seed=seed), few_images) for seed in (0, 0, 1)]
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[0], weights[2]) > 0.01


def test_generators_of_torch_numpy_and_python_draw_the_same_in_a_repeated_and_in_a_resumed_run() -> None:
    drawn = list[float]()

    class Noisy(Regression):
        def prepare(self, inputs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            drawn.extend((np.random.random(), random.random(), torch.rand(()).item()))
            return inputs

        def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
            drawn.append(np.random.random())
            return super().loss(outputs, targets) * (1 + random.random())

        def create_model(self) -> nn.Module:
            return nn.Linear(2, 1)

    def run(first_epoch: int, seed: int = 0) -> list[float]:
        drawn.clear()
        config = replace(CONFIG, num_epochs=2, batch_size=4, lr_schedule="constant", seed=seed)
        state = create_state(Noisy(), config, 12, Group())
        state.epoch = first_epoch
        Trainer(Noisy(), state, Split(Arrays(np.ones((12, 2), np.float32), np.zeros(12))), config, Group()).train()
        return [*drawn]

    whole = run(0)
    assert len({*whole}) == len(whole) == 2 * 3 * 4, "each step draws other numbers"
    assert run(0) == whole
    assert run(1) == whole[3 * 4 :]
    assert set(run(0, seed=1)).isdisjoint(whole)


def test_checkpoints_are_saved_every_n_steps_and_after_each_epoch(few_images: Arrays) -> None:
    seen: list[tuple[int, int, int, int]] = []

    def checkpoint(state: TrainingState, progress: Progress) -> None:
        seen.append((state.epoch, state.step, state.sums.num_examples, progress.num_examples))

    config = replace(CONFIG, num_epochs=2, checkpoint_every=10)  # 30 steps an epoch
    weights_after(config, few_images, Hooks(on_checkpoint=checkpoint))
    within = [(10, 200, 200), (20, 400, 400)]
    expected = [[*((epoch, *at) for at in within), (epoch + 1, 0, 0, 600)] for epoch in (0, 1)]
    assert seen == expected[0] + expected[1]


def rates_of(config: TrainConfig) -> list[float]:
    """Return the learning rate of each of 60 steps."""
    state, rates = create_state(mnist(), replace(config, num_epochs=2), 600, Group()), []
    for _ in range(60):
        rates.append(float(state.schedulers[""].get_last_lr()[0]))
        state.optimizer.step()
        state.schedulers[""].step()
    return rates


def test_the_one_cycle_schedule_climbs_and_falls() -> None:
    rates = rates_of(CONFIG)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(2e-3, rel=1e-2)
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in pairwise(rates[peak:]))
    assert rates[-1] < rates[0] < 1e-4


@pytest.mark.parametrize("warmup_steps", [0, 20])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_climbs_in_the_warm_up_then_follows_its_schedule(schedule: Any, warmup_steps: int) -> None:
    done = np.linspace(0, 1, 60 - warmup_steps, endpoint=False)
    after = {"constant": 1 + 0 * done, "cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done}[schedule]
    expected = 2e-3 * np.concatenate([np.arange(1, warmup_steps + 1) / max(1, warmup_steps), after])
    found = rates_of(replace(CONFIG, lr_schedule=schedule, warmup_steps=warmup_steps))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_progress_has_the_learning_rate_with_which_its_last_step_was_made(few_images: Arrays) -> None:
    rates: list[float] = []
    seen: list[float] = []
    hooks = Hooks(
        on_gradients=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]),
        on_progress=lambda state, progress: seen.append(progress.learning_rate - rates[-1]),
    )
    weights_after(replace(CONFIG, lr_schedule="linear"), few_images, hooks)
    assert set(seen) == {0}
    assert (len(rates), len(set(rates))) == (30, 30)


@pytest.mark.parametrize(
    ("config", "kind", "options"),
    [
        (CONFIG, torch.optim.Adam, {"lr": 2e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}),
        (replace(CONFIG, optimizer="adamw", weight_decay=0.1), torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.1}),
        (replace(CONFIG, optimizer="sgd", momentum=0.8), torch.optim.SGD, {"lr": 2e-3, "momentum": 0.8, "fused": True}),
        # A first step that fp16 skips would leave the momentum of PyTorch's fused SGD uninitialized.
        (replace(CONFIG, optimizer="sgd", precision="fp16"), torch.optim.SGD, {"fused": None}),
    ],
)
def test_the_optimizer_is_as_configured(config: TrainConfig, kind: type, options: dict[str, Any]) -> None:
    optimizer = create_state(mnist(), replace(config, lr_schedule="constant"), 600, Group()).optimizer
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in options} == options


@pytest.mark.parametrize(
    ("scores", "patience", "epochs"),
    [
        ([0.5, 0.7, 0.6, 0.8, 0.8, 0.7, 0.9], 2, 6),  # as good as the best is not better
        ([0.5, 0.7, 0.6, 0.8, 0.8, 0.7, 0.9], 1, 3),
        ([0.5, 0.7, 0.6, 0.8, 0.8, 0.7, 0.9], 3, 7),
        ([0.5, 0.4, 0.3], None, 3),
        ([-math.inf, -math.inf, 0.5], 2, 3),
    ],
)
def test_training_stops_when_validation_stalls(
    few_images: Arrays, scores: list[float], patience: int | None, epochs: int
) -> None:
    config = replace(CONFIG, batch_size=600, num_epochs=len(scores), early_stopping_patience=patience)
    hooks = Hooks(on_checkpoint=lambda state, progress: state.scores.append((scores[state.epoch - 1],)))
    state = trained(config, few_images, hooks)
    assert state.epoch == epochs
    Trainer(mnist(), state, Split(few_images), config, Group(), [hooks]).train()  # like a resumed run
    assert state.epoch == epochs


def test_a_callback_is_called_in_order_and_can_end_the_training(few_images: Arrays) -> None:
    calls: list[str] = []

    def on_epoch(state: TrainingState, progress: Progress) -> None:
        calls.append(f"epoch {state.epoch}, loss {progress.so_far['loss'] > 0}")
        state.ends = state.epoch == 2

    hooks = Hooks(
        on_start=lambda state, group: calls.append(f"start of {group.world_size}"),
        on_gradients=lambda state: calls.append(f"gradients after {state.epoch}/{state.step}"),
        on_step=lambda state: calls.append(f"step {state.epoch}/{state.step}"),
        on_progress=lambda state, progress: calls.append(f"progress {progress.epoch}/{progress.step}"),
        on_epoch=on_epoch,
    )
    trained(replace(CONFIG, batch_size=600, num_epochs=9), few_images, hooks)
    each = ["gradients after {0}/0", "step {0}/1", "progress {1}/1", "epoch {1}, loss True"]
    assert calls == ["start of 1", *(line.format(epoch, epoch + 1) for epoch in (0, 1) for line in each)]


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 1), (2, 2), (3, 1), (10, 3)])
def test_the_smallest_runs_work(few_images: Arrays, num_images: int, batch_size: int) -> None:
    split = Arrays(few_images.inputs[:num_images], few_images.targets[:num_images])
    weights = weights_after(replace(CONFIG, batch_size=batch_size, num_epochs=2), split)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    ("batch_size", "place"),
    [(10, (0, 10)), (600, (1, 0))],  # within an epoch of sixty steps; after an epoch of one step
)
def test_training_saves_and_stops_at_the_progress_after_a_request(
    batch_size: int, place: tuple[int, int], few_images: Arrays
) -> None:
    saved: list[tuple[int, int]] = []
    hooks = Hooks(
        on_checkpoint=lambda state, progress: saved.append((state.epoch, state.step)), wants_stop=lambda: True
    )
    with pytest.raises(StopWantedError):
        trained(replace(CONFIG, batch_size=batch_size, num_epochs=3), few_images, hooks)
    assert saved == [place]


def test_a_nan_loss_stops_training_at_its_step(few_images: Arrays) -> None:
    saved: list[int] = []

    def poison(state: TrainingState, progress: Progress) -> None:
        saved.append(state.step)
        if state.step == 7:
            next(state.model.parameters()).data.fill_(float("nan"))

    with pytest.raises(TrainingDivergedError, match="not finite at step 8 of epoch 1; lower"):
        trained(replace(CONFIG, checkpoint_every=1), few_images, Hooks(on_checkpoint=poison))
    assert saved == [1, 2, 3, 4, 5, 6, 7]


SPOILS = Hooks(on_epoch=lambda state, progress: next(state.model.parameters()).data.fill_(math.inf))


@pytest.mark.parametrize(
    ("changes", "callbacks", "step"),
    [({"checkpoint_every": 1, "learning_rate": 1e39, "lr_schedule": "constant"}, [], 1), ({}, [SPOILS], 30)],
    ids=["by a step", "by a callback"],
)
def test_weights_that_are_not_finite_get_into_no_checkpoint(
    few_images: Arrays, changes: dict[str, Any], callbacks: list[Callback], step: int
) -> None:
    saved: list[int] = []
    hooks = Hooks(on_checkpoint=lambda state, progress: saved.append(state.step))
    with pytest.raises(TrainingDivergedError, match=f"not finite at step {step} of epoch 1"):
        trained(replace(CONFIG, **changes), few_images, *callbacks, hooks)
    assert saved == []


class InDict(type(mnist())):  # type: ignore[misc]
    """MNIST, whose model has its logits in a dict."""

    def create_model(self) -> nn.Module:
        model = super().create_model()
        model.register_forward_hook(lambda module, inputs, logits: {"logits": logits})
        return model

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        assert outputs["logits"].dtype is torch.float32
        return super().loss(outputs["logits"], targets)

    def measure(self, outputs: Any, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        assert outputs["logits"].grad_fn is None, "it would keep the memory of all steps of a window"
        return super().measure(outputs["logits"], targets)


def test_outputs_in_a_dict_reach_the_loss_in_fp32_and_measure_without_a_graph(few_images: Arrays) -> None:
    config, workload = replace(CONFIG, precision="bf16"), InDict(mnist().settings, mnist().metadata)
    state = create_state(workload, config, len(few_images), Group())
    Trainer(workload, state, Split(few_images), config, Group()).train()
    assert state.epoch == 1


def test_auto_precision_is_bf16_if_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("mnist_ray.parallel.group.cpu_has_bf16", lambda answer=has_bf16: answer)
        assert resolve_precision("auto", Group()) == expected
        assert resolve_precision("fp32", Group()) == "fp32"


def test_complex_parameters_have_an_optimizer_that_takes_them() -> None:
    model = nn.ParameterDict({"waves": torch.ones(2, dtype=torch.complex64)})
    model["waves"].grad = torch.ones_like(model["waves"])
    mnist().create_optimizer(model, CONFIG).step()
    assert model["waves"].real.lt(1).all()


def trained_head(few_images: Arrays, *, is_frozen: bool) -> nn.Module:
    """Train the last layer only, with gradients that are all clipped; ``is_frozen``: the others have no gradients."""
    config = replace(CONFIG, lr_schedule="constant", clip_grad_norm=0.2)
    state = create_state(mnist(), config, len(few_images), Group())
    state.optimizers[""] = torch.optim.SGD(state.model.get_submodule("dense2").parameters(), lr=0.05)
    state.schedulers[""] = mnist().create_scheduler(state.optimizer, config, 1)
    for name, parameter in state.model.named_parameters():
        parameter.requires_grad = not is_frozen or name.startswith("dense2")
    Trainer(mnist(), state, Split(few_images), config, Group()).train()
    return state.model


def test_gradients_of_parameters_without_an_optimizer_are_not_clipped_and_do_not_add_up(few_images: Arrays) -> None:
    frozen, idle = (trained_head(few_images, is_frozen=is_frozen) for is_frozen in (True, False))
    assert largest_difference(frozen.state_dict(), idle.state_dict()) == 0
    assert all(parameter.grad is None for parameter in idle.parameters())
