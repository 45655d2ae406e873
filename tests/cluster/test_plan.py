from pathlib import Path

import pytest

from mnist_ray.cluster.plan import Cluster, Node, WorkerPlan, plan_workers, threads_per_worker
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.process import usable_cores

HEAD, SMALL, LARGE, GPU = Node(0), Node(2), Node(8), Node(4, 2)
AUTOSCALED = WorkerConfig(num_workers=4, cpus_per_worker=8, autoscaling=True)
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
    ],
)
def test_workers_are_planned_on_the_nodes(
    config: WorkerConfig, nodes: list[Node], num_chunks: int | None, expected: WorkerPlan
) -> None:
    assert plan_workers(config, Cluster(False, tuple(nodes), "/logs"), num_chunks) == expected


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (
            WorkerConfig(num_workers=5),
            [SMALL, SMALL],
            "the cluster cannot hold 5 workers of 1 CPU: it has 4 CPUs and 0 GPUs on 2 nodes; "
            "lower --num-workers or --cpus-per-worker, or add --autoscaling",
        ),
        (
            WorkerConfig(num_workers=2, cpus_per_worker=3),
            [SMALL, SMALL],
            "2 workers of 3 CPUs: it has 4 CPUs and 0 GPUs on 2 nodes; lower --num-workers or --cpus-per-worker",
        ),
        (WorkerConfig(num_workers=3), [GPU], "3 workers of 1 CPU and 1 GPU: it has 4 CPUs and 2 GPUs on 1 node;"),
        (WorkerConfig(num_workers=4, min_workers=2), [Node(1)], "cannot hold 2 workers of 1 CPU"),
        (WorkerConfig(num_workers=4, min_workers=5), [LARGE], "min_workers 5 is more than the 4 workers"),
        (
            WorkerConfig(use_gpu="yes"),
            [LARGE],
            "1 worker of 1 CPU and 1 GPU: it has 8 CPUs and 0 GPUs on 1 node; lower",
        ),
    ],
)
def test_an_impossible_plan_is_refused(config: WorkerConfig, nodes: list[Node], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan_workers(config, Cluster(False, tuple(nodes), "/logs"))
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
