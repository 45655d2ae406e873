"""What is shipped for clusters: cluster.yaml against Ray's schema and autoscaler, the manifests against Kubernetes'."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from mnist_ray import cli
from tests.conftest import ROOT, as_flags, run_job

MANIFEST = "deploy/rayjob.yaml"
HEAD_ID = "f" * 51 + "00000"  # which the fake provider expects of its head


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def cluster_config() -> dict[str, Any]:
    config: dict[str, Any] = read("cluster.yaml")
    return config


def test_cluster_yaml_is_valid_its_head_trains_nothing_and_workers_are_spot_instances(
    cluster_config: dict[str, Any],
) -> None:
    prepared = prepare_config(cluster_config)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"ray.head.default", "cpu_worker"}
    head = cluster_config["available_node_types"][cluster_config["head_node_type"]]
    worker = cluster_config["available_node_types"]["cpu_worker"]
    assert head["resources"]["CPU"] == 0
    assert (worker["min_workers"], worker["max_workers"]) == (0, cluster_config["max_workers"])
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster_config["idle_timeout_minutes"] > 0


def test_cluster_yaml_is_valid_with_its_gpu_worker() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    start = text.index("  # gpu_worker:")
    block = text[start : text.index("\n\n", start)]
    config = yaml.safe_load(text.replace(block, block.replace("  # ", "  ")))
    validate_config(prepare_config(config))
    assert config["available_node_types"]["gpu_worker"]["resources"]["GPU"] == 1


@pytest.mark.parametrize("name", ["cluster.yaml", MANIFEST, "deploy/Dockerfile", "deploy/slurm.sh"])
def test_files_have_no_credentials_and_do_not_open_the_dashboard(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"(?i)secret|password|access_key|auth_token *[:=]|AKIA", text)
    assert "0.0.0.0" not in text


def test_the_manifest_is_valid() -> None:
    manifest = read(MANIFEST)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    cluster = manifest["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        mounts = {mount["name"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert mounts == {"results"}
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("number", [0, 1], ids=["train", "tune"])
def test_the_manifest_runs_a_job_with_known_flags(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = re.findall(r"entrypoint: (.+)", (ROOT / MANIFEST).read_text())  # the one in a comment is for a sweep
    python, job, *flags = shlex.split(commands[number])
    monkeypatch.setattr("sys.argv", [job, *flags, "--resume"])
    assert cli.status_of(cli.COMMANDS[Path(job).stem]) == 2
    # All flags are known: the error is about the added one.
    assert (python, capsys.readouterr().err) == ("python", "error: --resume needs --run-name NAME\n")


def test_the_manifest_mounts_the_storage_claim() -> None:
    claim = read("deploy/storage.yaml")
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert f"claimName: {claim['metadata']['name']}" in (ROOT / MANIFEST).read_text()


def test_the_image_runs_as_an_ordinary_user_and_copies_existing_files() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith((" ", "#"))]
    assert [words[1] for words in instructions if words[0] == "USER"][-1] == "ray"
    copied = [source for words in instructions if words[0] == "COPY" for source in words[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert any(words[0] == "ARG" and words[1].startswith("TORCH_INDEX=") for words in instructions)


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/Dockerfile"])
def test_clusters_get_the_versions_that_were_tested_which_the_package_accepts(name: str) -> None:
    installs = re.findall(r"^[^#\n]*pip install.*", (ROOT / name).read_text(), re.MULTILINE)
    assert len(installs) == 2
    assert all("constraints.txt" in install for install in installs)
    pins = [Requirement(line) for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines()[1:]]
    accepted = {needed.name: needed for needed in map(Requirement, requires("mnist_ray") or ()) if not needed.marker}
    for pin in pins:
        (version,) = pin.specifier
        assert version.version in accepted[pin.name].specifier


def test_on_slurm_ray_spans_the_nodes_and_the_job_gets_the_arguments(tmp_path: Path) -> None:
    for name, body in {
        "bin/scontrol": "printf 'node-7\\nnode-8\\n'",
        "bin/srun": 'case "$*" in *get_node_ip_address*) echo 10.0.0.7;; *) printf "%s|" "$@";; esac',
        ".venv/bin/activate": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    allotted = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        [ROOT / "deploy" / "slurm.sh", "--num-workers", "4", "--run-name", "a b"],
        cwd=tmp_path,
        env={**os.environ, **allotted, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("|")[:-1] == [
        *("--cpus-per-task", "8", "ray", "symmetric-run", "--address", "10.0.0.7:6379", "--min-nodes", "2"),
        *("--num-cpus", "8", "--", "python", "jobs/train.py", "--num-workers", "4", "--run-name", "a b"),
    ]


def test_the_runtime_environment_has_all_dependencies() -> None:
    needed = {need for need in requires("mnist_ray") or [] if "extra ==" not in need and not need.startswith("ray[")}
    assert {*map(Requirement, needed)} <= {*map(Requirement, read("deploy/runtime-env.yaml")["pip"])}
    assert len(needed) >= 8


@pytest.fixture
def autoscaled_head(cluster_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head that starts cluster.yaml's node types as raylets on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    types = {name: {**kind, "node_config": {}} for name, kind in cluster_config["available_node_types"].items()}
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD_ID,
        "gcs_address": address,
        "launch_multiple": True,
    }
    config = {key: cluster_config[key] for key in ("cluster_name", "max_workers", "head_node_type")}
    config |= {"available_node_types": types, "provider": provider, "idle_timeout_minutes": 0.05, "auth": {}}
    config |= {"docker": {}, "upscaling_speed": 1.0, "file_mounts": {}, "file_mounts_sync_continuously": False}
    unused = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{name}_commands": [] for name in unused} | {"cluster_synced_files": []}
    (tmp_path / "fake.yaml").write_text(json.dumps(config))
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_FAKE_CLUSTER", "1"), ("RAY_enable_autoscaler_v2", "1")):
        monkeypatch.setenv(name, value)
    own = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    options = ["--head", "--block", "--num-cpus=0", f"--port={port}", "--include-dashboard=false"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *options),
            f"--autoscaling-config={tmp_path / 'fake.yaml'}",
        ],
        env={**os.environ, **own, "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "will now block" in line:
            break
    yield address
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_cluster_yamls_nodes_start_for_a_job_and_stop_when_idle(
    autoscaled_head: str, small_data: Path, tmp_path: Path
) -> None:
    flags = {"num_workers": 2, "cpus_per_worker": 8, "data_dir": small_data, "storage_path": tmp_path / "runs"}
    flags |= {"validation_size": 600, "batch_size": 50, "num_epochs": 1, "precision": "fp32"}
    done = run_job("train.py", *as_flags(flags), "--autoscaling", address=autoscaled_head)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note       the cluster is too small now; waiting for it to start nodes\n" in done.stdout
    assert "started    2 × cpu" in done.stdout
    code = (
        "import ray, sys, time; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "while sum(node['Alive'] for node in ray.nodes()) > 1: time.sleep(0.5)"
    )
    subprocess.run([sys.executable, "-c", code, autoscaled_head], timeout=60, check=True)
