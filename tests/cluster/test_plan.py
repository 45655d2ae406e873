from pathlib import Path

import pytest

from mnist_ray.cluster.plan import (
    Cluster,
    Node,
    WorkerPlan,
    cpus_for_each,
    node_of,
    plan_workers,
    threads_per_worker,
)
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.process import usable_cores


def cluster_of(*nodes: Node) -> Cluster:
    return Cluster(False, nodes, log_folder="/logs")


HEAD, SMALL, LARGE, GPU = Node(0), Node(2), Node(8), Node(4, 2)
SPOT, A100 = Node(2, labels={"market": "spot"}), Node(4, 2, labels={"ray.io/accelerator-type": "A100"})
MAC = node_of({"CPU": 8.0, "GPU": 1.0, "accelerator_type:M2-Max": 1.0})
AUTOSCALED = WorkerConfig(num_workers=4, cpus_per_worker=8, autoscaling=True)


def on_spot(num_workers: int, label: str) -> WorkerPlan:
    return WorkerPlan(num_workers, 2, False, False, labels=dict([label.split("=", 1)]))


ELASTIC = WorkerPlan(4, 1, False, False, min_workers=2)


@pytest.mark.parametrize(
    ("config", "nodes", "num_chunks", "expected"),
    [
        # by default one worker per node, with all of its cores, if it has any
        (WorkerConfig(), [SMALL], None, WorkerPlan(1, 2, False, False)),
        (WorkerConfig(), [HEAD, LARGE, LARGE], None, WorkerPlan(2, 8, False, False)),
        # a given number of workers shares the CPUs evenly
        (WorkerConfig(num_workers=3), [SMALL, LARGE], None, WorkerPlan(3, 2, False, False)),
        (WorkerConfig(num_workers=1), [SMALL, LARGE], None, WorkerPlan(1, 8, False, False)),
        (WorkerConfig(num_workers=2, cpus_per_worker=3), [LARGE], None, WorkerPlan(2, 3, False, False)),
        # by default one worker per GPU, on the nodes with GPUs
        (WorkerConfig(), [LARGE, GPU], None, WorkerPlan(2, 2, True, False)),
        (WorkerConfig(use_gpu="no"), [LARGE, GPU], None, WorkerPlan(2, 4, False, False)),
        (WorkerConfig(use_gpu="yes", num_workers=1), [GPU], None, WorkerPlan(1, 4, True, False)),
        # as many of them as have CPUs; if there are none, on the CPUs
        (WorkerConfig(), [Node(2, 8), GPU], None, WorkerPlan(4, 1, True, False)),
        (WorkerConfig(cpus_per_worker=3), [Node(4, 4), LARGE], None, WorkerPlan(1, 3, True, False)),
        (WorkerConfig(), [Node(0, 4), SMALL], None, WorkerPlan(1, 2, False, False)),
        # with chunks, as many workers as CPUs or chunks
        (WorkerConfig(), [SMALL], 4, WorkerPlan(2, 1, False, False)),
        (WorkerConfig(), [HEAD, LARGE, LARGE], 4, WorkerPlan(4, 1, False, False)),
        (WorkerConfig(num_workers=3), [LARGE], 4, WorkerPlan(3, 1, False, False)),
        (WorkerConfig(cpus_per_worker=4), [LARGE], 4, WorkerPlan(2, 4, False, False)),
        # no GPUs with chunks: their bits were never compared
        (WorkerConfig(), [GPU], 4, WorkerPlan(4, 1, False, False)),
        # an autoscaler starts more nodes, if the user says so
        (AUTOSCALED, [HEAD, SMALL], None, WorkerPlan(4, 8, False, True)),
        (AUTOSCALED, [HEAD, *[LARGE] * 4], None, WorkerPlan(4, 8, False, False)),
        (WorkerConfig(use_gpu="yes", autoscaling=True), [HEAD], None, WorkerPlan(1, 1, True, True)),
        # an elastic run starts on the current nodes
        (WorkerConfig(num_workers=4, min_workers=2, cpus_per_worker=1), [SMALL], None, ELASTIC),
        # only nodes with the labels count
        (WorkerConfig(label_selector=("market=spot",)), [SPOT, SPOT, LARGE], None, on_spot(2, "market=spot")),
        (WorkerConfig(label_selector=("market=in(spot,any)",)), [SPOT, LARGE], None, on_spot(1, "market=in(spot,any)")),
        (WorkerConfig(label_selector=("market=!spot",)), [SPOT, SMALL, SMALL], None, on_spot(2, "market=!spot")),
        # a Mac's GPU does not count
        (WorkerConfig(), [MAC, Node(16, 4)], None, WorkerPlan(4, 4, True, False)),
    ],
)
def test_workers_are_planned_on_the_nodes(
    config: WorkerConfig, nodes: list[Node], num_chunks: int | None, expected: WorkerPlan
) -> None:
    assert plan_workers(config, cluster_of(*nodes), num_chunks) == expected


@pytest.mark.parametrize(
    ("placement", "nodes", "cpus"),
    [
        ("STRICT_SPREAD", [SMALL, LARGE], 2),
        ("STRICT_SPREAD", [LARGE], None),
        ("STRICT_PACK", [SMALL, LARGE], 4),
        ("STRICT_PACK", [Node(1), Node(1)], None),
        ("PACK", [Node(1), Node(1)], 1),
    ],
)
def test_a_strict_placement_is_planned_only_if_the_nodes_allow_it(
    placement: str, nodes: list[Node], cpus: int | None
) -> None:
    assert cpus_for_each(nodes, 2, None, False, placement) == cpus


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (
            WorkerConfig(num_workers=5),
            [SMALL, SMALL],
            "the cluster cannot hold 5 workers of 1 CPU: it has 4 CPUs on 2 nodes; "
            "lower --num-workers, or add --autoscaling",
        ),
        (
            WorkerConfig(num_workers=2, cpus_per_worker=3),
            [SMALL, SMALL],
            "2 workers of 3 CPUs: it has 4 CPUs on 2 nodes; lower --num-workers or --cpus-per-worker",
        ),
        (WorkerConfig(num_workers=3), [GPU], "3 workers of 1 CPU and 1 GPU: it has 4 CPUs and 2 GPUs on 1 node;"),
        (WorkerConfig(num_workers=4, min_workers=2), [Node(1)], "cannot hold 2 workers of 1 CPU"),
        (WorkerConfig(num_workers=4, min_workers=5), [LARGE], "min_workers 5 is more than the 4 workers"),
        (
            WorkerConfig(num_workers=2, min_workers=1, placement_strategy="STRICT_SPREAD"),
            [SMALL, SMALL],
            "placement_strategy STRICT_SPREAD needs a fixed --num-workers",
        ),
        (
            WorkerConfig(label_selector=("market=spot", "ray.io/accelerator-type=A100")),
            [SPOT, A100],
            "0 nodes with market=spot, ray.io/accelerator-type=A100; lower --num-workers, or leave label_selector",
        ),
        (WorkerConfig(use_gpu="yes"), [LARGE], "--use-gpu yes, but the cluster has no GPU; use --use-gpu no"),
    ],
)
def test_an_impossible_plan_is_refused(config: WorkerConfig, nodes: list[Node], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan_workers(config, cluster_of(*nodes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("assigned", "cores", "workers", "batch_size", "threads"),
    [(2, 2, 1, 128, 2), (1, 2, 4, 128, 1), (8, 2, 1, 128, 2), (4, 16, 2, 128, 4), (0.5, 2, 1, 128, 1),
     (2, 2, 1, 8, 1), (2, 2, 1, 16, 2), (16, 16, 1, 32, 4), (2, 2, 1, 1, 1)],
)  # fmt: skip
def test_threads_follow_a_workers_real_cores_and_its_batch(
    assigned: float, cores: int, workers: int, batch_size: int, threads: int
) -> None:
    assert threads_per_worker(assigned, cores, workers, batch_size) == threads


def test_all_gpus_count_except_those_of_apples_chips() -> None:
    for kind, num_gpus in (("A100", 2), ("MXC500", 2), ("M1", 0), ("M3-Max", 0)):
        assert node_of({"CPU": 8.0, "GPU": 2.0, f"accelerator_type:{kind}": 1.0}) == Node(8, num_gpus), kind
    assert node_of({"CPU": 8, "GPU": 1}) == Node(8, 1)
    assert node_of({"memory": 1e9}) == Node(0, 0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_a_containers_quota_limits_the_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr("mnist_ray.process._CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64), raising=False)
    assert usable_cores() == expected
