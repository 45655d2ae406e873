import json
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from mnist_ray.storage import locate
from mnist_ray.trackers import Tracker
from mnist_ray.training.events import Event, Progress, Started, Validated
from mnist_ray.workload import user_code
from tests.conftest import ROOT, mnist

TRAINED, VALIDATED = {"loss": 0.25, "accuracy": 0.75}, {"loss": 0.5, "accuracy": float("nan")}
EVENTS: list[Event] = [
    Started(2, ("host",), 1, "cpu", "fp32", epoch=0, step=0, num_steps=4),
    Validated(1, VALIDATED, 1.0),
    Progress(2, 1, 4, [0.25], TRAINED, TRAINED, 16, 2.0, 0.01),
]


@pytest.fixture
def kind() -> type[Tracker]:
    return user_code.find(str(ROOT / "examples" / "prometheus_tracker.py"), Tracker)


def in_the_board() -> set[str]:
    """Return the metrics of a run that the board shows."""
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    return set(re.findall(r"ray_mnist_ray_\w+", shown))


def test_gauges_have_a_runs_figures_and_the_board_shows_each(
    kind: type[Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauges: dict[str, Mock] = {}
    monkeypatch.setattr(sys.modules[kind.__module__], "Gauge", lambda name, *_, **__: gauges.setdefault(name, Mock()))
    tracker = kind(locate(str(tmp_path), "one"), mnist(), {})
    for event in EVENTS:
        tracker.log(event)
    for gauge in gauges.values():
        gauge.set_default_tags.assert_called_once_with({"run": "one"})
    assert {name: [call.args for call in gauge.set.call_args_list] for name, gauge in gauges.items()} == {
        "mnist_ray_workers": [(2,)],
        "mnist_ray_epochs": [(1.25,)],
        "mnist_ray_examples_per_second": [(8.0,)],
        "mnist_ray_learning_rate": [(0.01,)],
        "mnist_ray_train": [(0.25, {"metric": "loss"}), (0.75, {"metric": "accuracy"})],
        "mnist_ray_val": [(0.5, {"metric": "loss"})] * 2,  # again and again, else Ray leaves it out
    }
    assert in_the_board() == {f"ray_{name}" for name in gauges}


@pytest.mark.long
@pytest.mark.usefixtures("ray_address")
def test_rays_node_serves_what_the_board_shows_to_prometheus(kind: type[Tracker], tmp_path: Path) -> None:
    tracker = kind(locate(str(tmp_path), "one"), mnist(), {})
    node: dict[str, Any] = next(node for node in ray.nodes() if node["Alive"])
    own: list[str] = []  # lines of this run; the shared Ray serves those of other tests' runs, too
    give_up = time.monotonic() + 60
    while {line.partition("{")[0] for line in own} != in_the_board() and time.monotonic() < give_up:
        for event in EVENTS:
            tracker.log(event)
        time.sleep(1)
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        served = urllib.request.urlopen(url).read().decode()
        own = [line for line in served.splitlines() if line.startswith("ray_mnist_ray_") and 'run="one"' in line]
    (line,) = [line for line in own if line.startswith("ray_mnist_ray_train{") and 'metric="accuracy"' in line]
    assert line.endswith(" 0.75")
    assert {line.partition("{")[0] for line in own} == in_the_board()
