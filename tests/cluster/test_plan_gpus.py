import pytest
from ray.util.accelerators import accelerators

from mnist_ray.cluster.plan import Cluster, Node, node_of, plan_workers
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError

MAC = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:M2-Max": 1.0, "memory": 1e10, "node:127.0.0.1": 1.0}
SERVER = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0, "memory": 1e11, "node:10.0.0.1": 1.0}


def accelerators_of(maker: str) -> list[str]:
    """Return the types by which Ray calls a maker's accelerators."""
    return [value for name, value in vars(accelerators).items() if name.startswith(maker)]


@pytest.mark.parametrize("kind", ["M1", "M2-Pro", "M2-Max", "M3-Ultra", "M4"])
def test_the_gpu_of_an_apple_chip_does_not_count(kind: str) -> None:
    assert node_of({"CPU": 8, "GPU": 1, f"accelerator_type:{kind}": 1}) == Node(8, 0)


@pytest.mark.parametrize("kind", ["A100", "T4", "M60", "RTX-PRO-6000", "AMD-Instinct-MI300A", "Intel-GPU-Max-1550"])
def test_any_other_gpu_counts(kind: str) -> None:
    assert node_of({"CPU": 16, "GPU": 4, f"accelerator_type:{kind}": 1}) == Node(16, 4)


def test_ray_calls_no_gpu_of_nvidia_as_it_calls_apples() -> None:
    kinds = accelerators_of("NVIDIA_")
    assert len(kinds) > 10
    assert {node_of({"GPU": 2, f"accelerator_type:{kind}": 1}).num_gpus for kind in kinds} == {2}


def test_every_apple_chip_that_ray_knows_is_told() -> None:
    kinds = accelerators_of("APPLE_M")
    assert len(kinds) > 5
    assert {node_of({"GPU": 1, f"accelerator_type:{kind}": 1}).num_gpus for kind in kinds} == {0}


def test_a_gpu_whose_type_ray_does_not_tell_counts() -> None:
    assert node_of({"CPU": 8, "GPU": 1}) == Node(8, 1)


@pytest.mark.parametrize("resources", [{}, {"memory": 1e9}, {"CPU": 0.0}])
def test_a_node_that_offers_nothing_has_neither_cpus_nor_gpus(resources: dict[str, float]) -> None:
    assert node_of(resources) == Node(0, 0)


def test_a_mac_trains_on_its_cpus() -> None:
    cluster = Cluster(True, (node_of(MAC),), "/logs")
    plan = plan_workers(WorkerConfig(), cluster)
    assert (plan.num_workers, plan.cpus_per_worker, plan.use_gpu) == (1, 8, False)
    with pytest.raises(UsageError, match="the cluster has no GPU"):
        plan_workers(WorkerConfig(use_gpu="yes"), cluster)


def test_macs_beside_a_server_leave_the_gpus_to_it() -> None:
    plan = plan_workers(WorkerConfig(), Cluster(False, (node_of(MAC), node_of(SERVER)), "/logs"))
    assert (plan.num_workers, plan.cpus_per_worker, plan.use_gpu) == (4, 4, True)
