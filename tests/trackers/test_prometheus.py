import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from mnist_ray.storage import locate
from mnist_ray.trackers import prometheus
from mnist_ray.trackers.prometheus import RayMetrics
from mnist_ray.training.events import Event, Progress, Started, Validated
from tests.conftest import ROOT, mnist

TRAINED, VALIDATED = {"loss": 0.25, "accuracy": 0.75}, {"loss": 0.5, "accuracy": float("nan")}
EVENTS: list[Event] = [
    Started(2, ("host",), 1, "cpu", "fp32", epoch=0, step=0, num_steps=4),
    Validated(1, VALIDATED, 1.0),
    Progress(2, 1, 4, [0.25], TRAINED, TRAINED, 16, 2.0),
]


def in_the_board() -> set[str]:
    """Return the metrics of a run that the board shows."""
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    return set(re.findall(r"ray_mnist_ray_\w+", shown))


class Gauge:
    """What keeps what Ray would serve."""

    kept: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tags = name, dict.fromkeys(tag_keys, "")

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags |= tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        labels = (self.name, *(self.tags | (tags or {})).values())
        self.kept[labels] = value


def test_gauges_have_a_runs_figures_and_the_board_shows_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gauge, "kept", {}, raising=False)
    monkeypatch.setattr(prometheus, "Gauge", Gauge)
    tracker = RayMetrics(locate(str(tmp_path), "one"), mnist(), {})
    for event in EVENTS:
        tracker.log(event)
    assert Gauge.kept == {
        ("mnist_ray_workers", "one"): 2,
        ("mnist_ray_epochs", "one"): 1.25,
        ("mnist_ray_examples_per_second", "one"): 8.0,
        ("mnist_ray_train", "one", "loss"): 0.25,
        ("mnist_ray_train", "one", "accuracy"): 0.75,
        ("mnist_ray_val", "one", "loss"): 0.5,
    }
    assert in_the_board() == {f"ray_{name}" for name, *_ in Gauge.kept}


@pytest.mark.long
@pytest.mark.usefixtures("ray_address")
def test_rays_node_serves_what_the_board_shows_to_prometheus(tmp_path: Path) -> None:
    tracker = RayMetrics(locate(str(tmp_path), "one"), mnist(), {})
    node: dict[str, Any] = next(node for node in ray.nodes() if node["Alive"])
    served, give_up = "", time.monotonic() + 60
    while not all(f"{name}{{" in served for name in in_the_board()) and time.monotonic() < give_up:
        for event in EVENTS:
            tracker.log(event)
        time.sleep(1)
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        served = urllib.request.urlopen(url).read().decode()
    (line,) = re.findall(r'^ray_mnist_ray_train\{.*metric="accuracy".*$', served, re.MULTILINE)
    assert 'run="one"' in line
    assert line.endswith(" 0.75")
    assert all(f"{name}{{" in served for name in in_the_board())
