import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from mnist_ray.config import TrainConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import build
from mnist_ray.workload import Workload

MODEL = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})


def config_of(**values: object) -> TrainConfig:
    return build(TrainConfig, {"learning_rate": 0.1, **values})


def optimizer_of(config: TrainConfig) -> torch.optim.Optimizer:
    return Workload().create_optimizer(MODEL, config)


def rates(**values: object) -> list[list[float]]:
    """Return the learning rates of each group in six steps."""
    config = config_of(**values)
    optimizer = optimizer_of(config)
    schedule, found = Workload().create_scheduler(optimizer, config, 6), []
    for _ in range(6):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(of_group) for of_group in zip(*found, strict=True)]


def test_any_optimizer_of_torch_gets_its_arguments_and_the_usual_settings() -> None:
    found = optimizer_of(config_of(optimizer="torch.optim.RAdam(betas=[0.8, 0.9], eps=1e-6)", weight_decay=0.01))
    assert isinstance(found, torch.optim.RAdam)
    expected = {"lr": 0.1, "weight_decay": 0.01, "betas": [0.8, 0.9], "eps": 1e-6}
    assert {name: found.defaults[name] for name in expected} == expected
    rprop = optimizer_of(config_of(optimizer="torch.optim.Rprop"))
    assert isinstance(rprop, torch.optim.Rprop), "it takes no weight decay"


def test_any_schedule_of_torch_gets_the_number_of_steps_if_it_takes_it() -> None:
    steps = rates(lr_schedule="torch.optim.lr_scheduler.StepLR(step_size=2, gamma=0.5)")
    assert steps == [pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])]
    ((*_, last),) = rates(lr_schedule="torch.optim.lr_scheduler.PolynomialLR(power=1)")
    assert last == pytest.approx(0.1 / 6)
    plateau = config_of(lr_schedule="torch.optim.lr_scheduler.ReduceLROnPlateau(patience=3)")
    assert isinstance(Workload().create_scheduler(optimizer_of(plateau), plateau, 6), lr_scheduler.ReduceLROnPlateau)


@pytest.mark.parametrize("schedule", ["linear", "one-cycle", "torch.optim.lr_scheduler.OneCycleLR"])
def test_learning_rates_by_name_scale_the_whole_schedule(schedule: str) -> None:
    (whole,) = rates(lr_schedule=schedule)
    backbone, head, others = rates(lr_schedule=schedule, lr_scales="backbone.weight=0.1 head.*=2")
    assert others == pytest.approx(whole)
    assert backbone == pytest.approx([0.1 * rate for rate in whole])
    assert head == pytest.approx([2 * rate for rate in whole])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "radam"}, r"--optimizer must be adam, adamw, sgd or a class such as torch\.optim\.RAdam"),
        ({"optimizer": "torch.optim.RAdm"}, r"torch\.optim has no class RAdm; did you mean RAdam\?"),
        ({"optimizer": "os.PathLike"}, r"torch\.optim has no class os\.PathLike"),
        ({"optimizer": "torch.optim.RAdam(beta=1)"}, r"torch\.optim\.RAdam\(beta=1\): got an unexpected keyword"),
        (
            {"optimizer": "torch.optim.RAdam(eps=-1.0)"},
            r"--optimizer torch.*RAdam\(eps=-1\.0\): Invalid epsilon",
        ),
        (
            {"lr_schedule": "torch.optim.lr_scheduler.StepLR"},
            "--lr-schedule .*StepLR: .*missing 1 .*'step_size'",
        ),
        ({"lr_scales": "head.*"}, r"--set lr_scales must be PATTERN=FACTOR, such as backbone\.\*=0\.1"),
        (
            {"lr_scales": "haed.weight=2"},
            r"lr_scales: no parameter is called haed\.weight; did you mean head\.weight",
        ),
    ],
)
def test_a_wrong_name_argument_or_pattern_is_one_line(values: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        rates(**values)
    assert "\n" not in str(raised.value)
