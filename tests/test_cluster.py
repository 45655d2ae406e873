import pytest

from mnist_ray import cluster
from mnist_ray.cluster import Cluster, Node, WorkerPlan
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError


def cluster_of(*nodes: Node, autoscaled: tuple[Node, ...] = ()) -> Cluster:
    return Cluster(is_local=False, nodes=nodes, autoscaled_nodes=autoscaled, log_folder="/logs")


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
    assert cluster.plan_workers(config, cluster_of(*nodes)) == expected


def test_what_an_autoscaler_may_add_is_waited_for() -> None:
    small = cluster_of(HEAD, SMALL, autoscaled=(LARGE, LARGE))
    assert cluster.plan_workers(WorkerConfig(num_workers=2), small) == WorkerPlan(2, 1, False, False)
    assert cluster.plan_workers(WorkerConfig(num_workers=4), small) == WorkerPlan(4, 4, False, True)


def test_the_first_worker_of_an_empty_cluster_is_waited_for() -> None:
    assert cluster.plan_workers(WorkerConfig(), cluster_of(HEAD, autoscaled=(LARGE,))) == WorkerPlan(1, 8, False, True)


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (
            WorkerConfig(num_workers=5),
            [SMALL, SMALL],
            "the cluster can never hold 5 workers of 1 CPU: it has 4 CPUs on 2 nodes; lower --num-workers",
        ),
        (
            WorkerConfig(num_workers=2, cpus_per_worker=3),
            [SMALL, SMALL],
            "2 workers of 3 CPUs: it has 4 CPUs on 2 nodes; lower --num-workers or --cpus-per-worker",
        ),
        (WorkerConfig(num_workers=3), [GPU], "3 workers of 1 CPU and 1 GPU: it has 4 CPUs and 2 GPUs on 1 node;"),
        (WorkerConfig(use_gpu="yes"), [LARGE], "--use-gpu yes, but the cluster has no GPU; use --use-gpu no"),
    ],
)
def test_what_can_never_be_held_is_refused(config: WorkerConfig, nodes: list[Node], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        cluster.plan_workers(config, cluster_of(*nodes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("assigned", "cores", "workers", "threads"),
    [(2, 2, 1, 2), (1, 2, 4, 1), (8, 2, 1, 2), (4, 16, 2, 4), (0.5, 2, 1, 1)],
)
def test_threads_follow_the_cpus_that_a_worker_really_has(
    assigned: float, cores: int, workers: int, threads: int
) -> None:
    assert cluster.threads_per_worker(assigned, cores, workers) == threads
