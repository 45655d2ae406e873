"""Runs whose model is sharded over two workers (``--strategy fsdp``)."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from mnist_ray.checkpoints.find import read_weights
from mnist_ray.errors import JobError
from tests.conftest import Flags, folder_at, run_main

CUSTOM = """\
import torch
from mnist_ray.mnist import MNIST

class Sign(torch.optim.Optimizer):
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 0.001 * torch.ones(parameter.shape) * parameter.grad.sign()

class Custom(MNIST):
    def create_optimizer(self, model, config):
        return Sign(model.parameters(), {"lr": 0.1})
"""


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(folder_at(run / json.loads((run / "result.json").read_text())["checkpoint"]))


@pytest.mark.usefixtures("ray_address")
def test_a_sharded_run_is_tested_exported_and_the_start_of_another(
    quick: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"num_workers": 2, "strategy": "fsdp", "ema_decay": 0.9, "clip_grad_norm": 1.0, "num_epochs": 1}
    run_main("train", *quick(**flags))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    names = {path.name for path in (tmp_path / "run" / result["checkpoint"]).iterdir()}
    parts = {f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "trained", "optimizer") for n in (1, 2)}
    assert names == {*parts, "training.pt", "state.json"}

    run_main("export", str(tmp_path / "run"), "--output", str(tmp_path / "digits.safetensors"))
    exported = load_file(tmp_path / "digits.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in weights_of(tmp_path / "run").items())

    capsys.readouterr()
    begun = quick(**flags, run_name="begun", init_from=tmp_path / "run", learning_rate=1e-9, limit=0.4)
    run_main("train", *begun)
    assert f"init from  {tmp_path}/run/{result['checkpoint']}: 10 of the model's 10 tensors" in capsys.readouterr().out
    begun_weights = weights_of(tmp_path / "begun")
    assert all(torch.allclose(exported[name], value, atol=1e-5) for name, value in begun_weights.items())


@pytest.mark.usefixtures("ray_address")
def test_an_optimizer_that_cannot_take_parts_of_tensors_is_one_line(quick: Flags, tmp_path: Path) -> None:
    (tmp_path / "custom.py").write_text(CUSTOM)
    with pytest.raises(JobError, match=r"DTensor.*\(custom\.py, line 7\)"):
        run_main("train", *quick(num_workers=2, strategy="fsdp", workload=tmp_path / "custom.py"))


@pytest.mark.usefixtures("ray_address")
def test_a_model_that_is_too_large_for_the_driver_is_not_tried_there(
    quick: Flags, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Mock(available=2**18))
    run_main("train", *quick(num_workers=2, strategy="fsdp"), "--dry-run")
    said = "note       skipping the trial batch: the model needs 0.4 MiB, but only 0.2 MiB are free here"
    assert said in capsys.readouterr().out
