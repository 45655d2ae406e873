from unittest.mock import Mock

import pytest

from mnist_ray.cluster import connect, plan
from mnist_ray.cluster.plan import Cluster, Node, WorkerPlan
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError


def cluster_of(*nodes: Node, is_local: bool = False) -> Cluster:
    return Cluster(is_local, nodes, log_folder="/logs")


HEAD, SMALL, LARGE, GPU = Node(0), Node(2), Node(8), Node(4, 2)


@pytest.mark.parametrize(
    ("config", "nodes", "expected"),
    [
        # by default one worker per node, with all of its cores, where it has any
        (WorkerConfig(), [SMALL], WorkerPlan(1, 2, False, False)),
        (WorkerConfig(), [HEAD, LARGE, LARGE], WorkerPlan(2, 8, False, False)),
        # a number of workers shares the CPUs evenly
        (WorkerConfig(num_workers=2), [SMALL], WorkerPlan(2, 1, False, False)),
        (WorkerConfig(num_workers=3), [LARGE], WorkerPlan(3, 2, False, False)),
        (WorkerConfig(num_workers=3), [SMALL, LARGE], WorkerPlan(3, 2, False, False)),
        (WorkerConfig(num_workers=1), [SMALL, LARGE], WorkerPlan(1, 8, False, False)),
        (WorkerConfig(num_workers=2, cpus_per_worker=3), [LARGE], WorkerPlan(2, 3, False, False)),
        # by default one worker per GPU, on the nodes that have some
        (WorkerConfig(), [LARGE, GPU], WorkerPlan(2, 2, True, False)),
        (WorkerConfig(use_gpu="no"), [LARGE, GPU], WorkerPlan(2, 4, False, False)),
        (WorkerConfig(use_gpu="yes", num_workers=1), [GPU], WorkerPlan(1, 4, True, False)),
    ],
)
def test_workers_are_planned_on_what_is_there(config: WorkerConfig, nodes: list[Node], expected: WorkerPlan) -> None:
    assert plan.plan_workers(config, cluster_of(*nodes)) == expected


@pytest.mark.parametrize(
    ("config", "nodes", "expected"),
    [
        # as many workers as there are CPUs, or chunks
        (WorkerConfig(), [SMALL], WorkerPlan(2, 1, False, False)),
        (WorkerConfig(), [HEAD, LARGE, LARGE], WorkerPlan(4, 1, False, False)),
        (WorkerConfig(num_workers=3), [LARGE], WorkerPlan(3, 1, False, False)),
        (WorkerConfig(cpus_per_worker=4), [LARGE], WorkerPlan(2, 4, False, False)),
        # no GPUs, whose bits were never compared
        (WorkerConfig(), [GPU], WorkerPlan(4, 1, False, False)),
    ],
)
def test_workers_whose_number_does_not_matter_are_planned_on_all_cpus(
    config: WorkerConfig, nodes: list[Node], expected: WorkerPlan
) -> None:
    assert plan.plan_workers(config, cluster_of(*nodes), num_chunks=4) == expected


def test_nodes_that_are_not_there_yet_are_waited_for_where_the_user_says_that_they_come() -> None:
    config = WorkerConfig(num_workers=4, cpus_per_worker=8, autoscaling=True)
    assert plan.plan_workers(config, cluster_of(HEAD, SMALL)) == WorkerPlan(4, 8, False, True)
    assert plan.plan_workers(config, cluster_of(HEAD, *[LARGE] * 4)) == WorkerPlan(4, 8, False, False)
    first = WorkerConfig(use_gpu="yes", autoscaling=True)
    assert plan.plan_workers(first, cluster_of(HEAD)) == WorkerPlan(1, 1, True, True)


def test_an_elastic_run_starts_with_what_is_there() -> None:
    config = WorkerConfig(num_workers=4, min_workers=2, cpus_per_worker=1)
    assert plan.plan_workers(config, cluster_of(SMALL)) == WorkerPlan(4, 1, False, False, min_workers=2)
    with pytest.raises(UsageError, match="cannot hold 2 workers of 1 CPU"):
        plan.plan_workers(config, cluster_of(Node(1)))
    with pytest.raises(UsageError, match="--min-workers 5 is more than the 4 workers"):
        plan.plan_workers(WorkerConfig(num_workers=4, min_workers=5), cluster_of(LARGE))


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
def test_a_strict_placement_is_only_planned_where_it_can_be(
    placement: str, nodes: list[Node], cpus: int | None
) -> None:
    assert plan.cpus_for_each(nodes, 2, None, False, placement) == cpus


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
        (
            WorkerConfig(num_workers=2, min_workers=1, placement="STRICT_SPREAD"),
            [SMALL, SMALL],
            "--placement STRICT_SPREAD needs a fixed --num-workers",
        ),
        (WorkerConfig(use_gpu="yes"), [LARGE], "--use-gpu yes, but the cluster has no GPU; use --use-gpu no"),
    ],
)
def test_what_can_never_be_held_is_refused(config: WorkerConfig, nodes: list[Node], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan.plan_workers(config, cluster_of(*nodes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("assigned", "cores", "workers", "batch_size", "threads"),
    [(2, 2, 1, 128, 2), (1, 2, 4, 128, 1), (8, 2, 1, 128, 2), (4, 16, 2, 128, 4), (0.5, 2, 1, 128, 1),
     (2, 2, 1, 8, 1), (2, 2, 1, 16, 2), (16, 16, 1, 32, 4), (2, 2, 1, 1, 1)],
)  # fmt: skip
def test_threads_follow_the_cpus_that_a_worker_really_has_and_its_images(
    assigned: float, cores: int, workers: int, batch_size: int, threads: int
) -> None:
    assert plan.threads_per_worker(assigned, cores, workers, batch_size) == threads


def test_work_that_is_done_meanwhile_is_done_afterwards_and_its_error_is_raised() -> None:
    done: list[int] = []
    with connect._beside(lambda: done.append(1)):
        pass
    assert done == [1]
    with (
        pytest.raises(UsageError, match="it does not fit"),
        connect._beside(Mock(side_effect=UsageError("it does not fit"))),
    ):
        pass
