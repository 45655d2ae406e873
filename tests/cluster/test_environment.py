import dataclasses
import os
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest

from mnist_ray import cli, process, ray_versions
from mnist_ray.cluster import environment
from mnist_ray.config import WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.run.ray_train import use_nodes_interface

NOT_FORKED = WorkerConfig(fork_workers="no")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove this process's variables for Ray and OpenMP."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "GOMP_"))}
    monkeypatch.setattr(os, "environ", others)


@pytest.mark.parametrize(
    ("given", "has_own"),
    [({}, True), ({"RAY_AUTH_MODE": "disabled"}, False), ({"RAY_AUTH_TOKEN_PATH": "/token"}, False)],
)
def test_a_local_ray_has_a_token_of_its_own_unless_the_user_has_decided(given: dict[str, str], has_own: bool) -> None:
    given |= {"RAY_ADDRESS": "local", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "7"}
    os.environ |= given
    with environment.prepared(NOT_FORKED):
        environment.prepare_local()
    assert len(os.environ.get("RAY_AUTH_TOKEN", "")) == (64 if has_own else 0)
    assert given.items() <= os.environ.items()


def test_a_workload_may_itself_call_the_api_while_another_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))  # imported by half
    with process.left_as_found(), process.left_as_found():
        os.environ["RAY_ADDRESS"] = "local"
    assert "RAY_ADDRESS" not in os.environ


def test_a_call_leaves_the_filters_of_warnings_as_they_were_also_beside_a_prediction() -> None:
    before, in_call, is_decoded = [*warnings.filters], threading.Event(), threading.Event()

    def call() -> None:
        with process.left_as_found():
            in_call.set()
            is_decoded.wait()

    caller = threading.Thread(target=call)
    with process.filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caller.start()
        in_call.wait(0.2)
    is_decoded.set()
    caller.join()
    assert [*warnings.filters] == before


@pytest.mark.parametrize(
    ("address", "set_by_user", "expected"),
    [
        ("127.0.0.1", {}, {"lo", "lo0"}),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=eth7"}, {"eth7"}),
        ("203.0.113.7", {}, {None}),
    ],
)
def test_gloo_and_nccl_use_the_interface_of_the_nodes_address_unless_the_user_has_set_one(
    address: str, set_by_user: dict[str, str], expected: set[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", set_by_user)
    monkeypatch.setattr("ray.util.get_node_ip_address", Mock(return_value=address))
    use_nodes_interface()
    assert set_by_user.get("GLOO_SOCKET_IFNAME") in expected
    exactly = {name and f"={name}" for name in expected}  # without =, NCCL would also use eth10 for eth1
    assert set_by_user.get("NCCL_SOCKET_IFNAME") in exactly


@pytest.mark.parametrize(
    ("num_running", "num_threads", "set_by_user", "expected"),
    [
        (1, 4, {}, {}),
        (2, 3, {}, {}),
        (2, 4, {}, {"GOMP_SPINCOUNT": "1000"}),
        (2, 4, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (2, 4, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (9, 1, {}, {}),
    ],
)
def test_threads_spin_briefly_if_other_programs_leave_too_few_cores(
    num_running: int,
    num_threads: int,
    set_by_user: dict[str, str],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {num_running}/9999 11206\n")
    monkeypatch.setattr(environment, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    os.environ |= set_by_user
    environment.spin_briefly_if_busy(num_threads)
    assert {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))} == expected


def test_threads_of_the_jobs_own_process_are_told_before_a_workload_imports_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loadavg").write_text("0.20 0.18 0.12 9/9999 11206\n")
    monkeypatch.setattr(environment, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr("mnist_ray.cli.usable_cores", lambda: 4)
    (tmp_path / "own_workload.py").write_text("import os\nraise ValueError(os.environ.get('GOMP_SPINCOUNT'))\n")
    flags = ["--num-workers", "0", "--workload", f"{tmp_path}/own_workload.py", "--storage-path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(UsageError, match="ValueError: 1000"):
        cli.train()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize(("is_sharded", "is_kept"), [(False, True), (True, False)])
def test_freed_memory_is_kept_but_large_blocks_of_a_sharded_run(is_sharded: bool, is_kept: bool) -> None:
    code = f"""
import resource
from pathlib import Path
import numpy as np
from mnist_ray.process import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

keep_freed_memory(is_sharded={is_sharded})
before = resident_mib()
blocks = [np.ones(2**20) for _ in range(10)]  # 80 MiB
del blocks
print(resident_mib() - before)
"""
    more_mib = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert (more_mib > 60) == is_kept, more_mib


@pytest.mark.parametrize(
    ("plain", "is_imported", "address", "version", "expected"),
    [
        (True, False, None, "2.60.0", {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}),
        (True, False, "local", "2.55.1", {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}),
        (False, False, "auto", "2.55.1", {"RAY_AUTH_MODE": "token"}),
        (False, False, "auto", "2.51.2", {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}),
        (True, True, None, "2.55.1", {}),
        (True, False, "127.0.0.1:6379", "2.55.1", {}),
    ],
)
def test_a_local_ray_is_protected_by_variables_that_ray_reads_when_it_is_imported(
    plain: bool,
    is_imported: bool,
    address: str | None,
    version: str,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {} if address is None else {"RAY_ADDRESS": address}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(ray_versions, "ray_version", lambda: version)
    monkeypatch.setitem(sys.modules, "ray", Mock())
    if not is_imported:
        monkeypatch.delitem(sys.modules, "ray")
    with environment.prepared(dataclasses.replace(NOT_FORKED, plain_ray=plain)):
        pass
    names = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE")
    assert {name: variables[name] for name in names if name in variables} == expected
