"""Trainings on a pretended GPU: what is copied to it, what waits for it, and that the results are the CPU's."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mnist_ray.config import TrainConfig
from mnist_ray.data.data import Arrays, Split
from mnist_ray.errors import JobError
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluate
from mnist_ray.training.state import TrainingState
from mnist_ray.training.trainer import Trainer, create_state
from tests.conftest import callback_at, mnist
from tests.gpu.conftest import Train, losses
from tests.gpu.pretended_gpu import pretended_gpu
from tests.ranks import Hooks

AT_START = {"usable", "create_state", "restore_newest", "_reader_of"}
NOT_AT_EACH_STEP = {*AT_START, "decide", "close", "_save", "on_checkpoint", "evaluate_here"}
"""Functions that may wait for the GPU."""
CHOOSING = {"augmented", "_divide_by_weights"}
"""Functions that wait at each step: an example's, to leave out work that is expensive on a CPU; and, only with weights,
one that must know whether the batch has any."""


@pytest.mark.parametrize("example", ["mnist", "digits", "shapes", "diabetes", "gpt", "finetune", "shards"])
def test_a_job_has_the_cpus_results_and_no_step_waits_for_the_gpu(example: str, train: Train) -> None:
    on_cpu = train(example, "cpu", "no")
    with pretended_gpu() as gpu:
        on_gpu = train(example, "cuda", "yes")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-5)
    assert gpu.num_received
    of_steps = [str(wait) for wait in gpu.waits if not wait.is_in({*NOT_AT_EACH_STEP, *CHOOSING})]
    assert [wait for wait in of_steps if "/transformers/" not in wait] == []


@pytest.mark.parametrize("devices", [("yes", "no"), ("no", "yes")])
def test_a_run_is_resumed_on_the_other_device(devices: tuple[str, str], train: Train, tmp_path: Path) -> None:
    undisturbed = train("shapes", "undisturbed", "no")
    name = f"stops_{devices[0]}.py"
    stops = callback_at(tmp_path / name, "wants_stop(self)", "return not os.path.exists(__file__ + '.go')")
    with pretended_gpu():
        with pytest.raises(JobError, match="a callback has stopped the training"):
            train("shapes", "resumed", devices[0], callback=stops)
        (tmp_path / f"{name}.go").touch()
        run = train("shapes", "resumed", devices[1], "--resume", callback=stops)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)


SPLIT = Arrays(np.random.default_rng(0).integers(256, size=(200, 28, 28), dtype=np.uint8), np.arange(200) % 10)
CONFIG = TrainConfig(precision="fp32", num_epochs=1, batch_size=20, validation_size=0)


class Images(Dataset):
    """The same images, read one by one."""

    def __len__(self) -> int:
        return len(SPLIT)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        return SPLIT[place]


def trained_on(device: str, config: TrainConfig = CONFIG, examples: Any = SPLIT, *callbacks: Callback) -> TrainingState:
    group = Group(device=torch.device(device))
    state = create_state(mnist(), config, len(SPLIT), group)
    Trainer(mnist(), state, Split(examples), config, group, callbacks).train()
    return state


@pytest.mark.parametrize(("examples", "of_a_step"), [(SPLIT, 1), (Images(), 2)])
def test_a_step_copies_indices_or_a_batch_to_the_gpu_and_nothing_else(examples: Any, of_a_step: int) -> None:
    received = []
    with pretended_gpu() as gpu:
        counts = Hooks(on_gradients=lambda state: received.append(gpu.num_received))
        trained_on("cuda", CONFIG, examples, counts)
    assert [after - before for before, after in pairwise(received)] == [of_a_step] * 9


@pytest.mark.parametrize(("optimizer", "num_waits"), [("adam", 0), ("sgd", 10)])
def test_with_fp16_sgd_waits_at_each_step_to_learn_whether_the_gradients_are_finite(
    optimizer: Literal["adam", "sgd"], num_waits: int
) -> None:
    with pretended_gpu() as gpu:
        state = trained_on("cuda", replace(CONFIG, precision="fp16", optimizer=optimizer))
    of_steps = [wait for wait in gpu.waits if not wait.is_in(NOT_AT_EACH_STEP)]
    assert state.scaler.is_enabled()
    assert len(of_steps) == num_waits
    assert all(wait.is_in({"_maybe_opt_step"}) for wait in of_steps)


def test_chunks_are_added_up_on_the_gpu() -> None:
    config = replace(CONFIG, reproducible=True)
    expected = trained_on("cpu", config).model.state_dict()
    with pretended_gpu():
        weights = trained_on("cuda", config).model.state_dict()
        found = {name: tensor.cpu() for name, tensor in weights.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_an_evaluation_waits_as_often_for_many_batches_as_for_few() -> None:
    waits = []
    with pretended_gpu() as gpu:
        model = trained_on("cuda").model
        for size in (50, 200):
            gpu.waits.clear()
            evaluate(mnist(), model, Split(SPLIT).take(slice(0, size)), TrainConfig())
            waits.append(len([wait for wait in gpu.waits if not wait.is_in({"_reader_of"})]))
    assert waits[0] == waits[1]
