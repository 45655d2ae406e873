"""What is shipped for clusters: cluster.yaml against Ray's schema and autoscaler, the manifests against Kubernetes'."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from email.message import Message
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import HTTPError
from urllib.request import Request

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from ray._private import ray_constants
from ray.autoscaler import tags
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts
from ray.serve.schema import ServeDeploySchema

from mnist_ray import cli
from tests.conftest import ROOT

MANIFEST, SERVICE = "deploy/rayjob.yaml", "deploy/rayservice.yaml"
SPOT_SCRIPT = "deploy/drain_spot_node.py"
DRAIN_TIMEOUT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


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
    text = (ROOT / "cluster.yaml").read_text()
    start = text.index("  # gpu_worker:")
    block = text[start : text.index("\n\n", start)]
    validate_config(prepare_config(yaml.safe_load(text.replace(block, block.replace("  # ", "  ")))))
    assert set(prepared["available_node_types"]) == {"ray.head.default", "cpu_worker"}
    head = cluster_config["available_node_types"][cluster_config["head_node_type"]]
    worker = cluster_config["available_node_types"]["cpu_worker"]
    assert head["resources"]["CPU"] == 0
    assert (worker["min_workers"], worker["max_workers"]) == (0, cluster_config["max_workers"])
    assert any(SPOT_SCRIPT in command for command in cluster_config["worker_start_ray_commands"])
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster_config["idle_timeout_minutes"] > 0


SHIPPED = [
    "cluster.yaml",
    "deploy/aws/head.json",
    "deploy/aws/bucket.json",
    MANIFEST,
    SERVICE,
    "deploy/Dockerfile",
    "deploy/slurm.sh",
]


def test_the_head_may_start_and_end_only_instances_of_its_cluster_and_give_them_only_the_profile_of_workers() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    nodes = yaml.safe_load(text.replace("# IamInstanceProfile", "IamInstanceProfile"))["available_node_types"]
    profiles = [nodes[name]["node_config"]["IamInstanceProfile"]["Name"] for name in ("ray.head.default", "cpu_worker")]
    assert profiles == ["mnist-ray-head", "mnist-ray-worker"]
    allowed = {statement["Sid"]: statement for statement in read("deploy/aws/head.json")["Statement"]}
    assert allowed["PassWorkerRole"]["Resource"] == f"arn:aws:iam::YOUR-ACCOUNT:role/{profiles[1]}"
    assert allowed["PassWorkerRole"]["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    of_cluster = {tags.TAG_RAY_CLUSTER_NAME: read("cluster.yaml")["cluster_name"]}
    for sid, key in {"RunInstances": "aws:RequestTag", "ChangeInstances": "aws:ResourceTag"}.items():
        condition = {f"{key}/{tag}": value for tag, value in of_cluster.items()}
        assert allowed[sid]["Condition"] == {"StringEquals": condition}
    assert [sid for sid, statement in allowed.items() if statement["Resource"] == "*"] == ["Describe"]


@pytest.mark.parametrize("name", SHIPPED)
def test_files_have_no_credentials_and_do_not_open_the_dashboard(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"(?i)secret|password|access_key|auth_token *[:=]|AKIA", text)
    assert "0.0.0.0" not in text


def test_the_manifest_is_valid() -> None:
    manifest = read(MANIFEST)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    check_cluster(manifest["spec"]["rayClusterSpec"])


def test_the_service_is_valid_fits_the_example_and_leaves_a_cpu_for_a_new_runs_first_replica() -> None:
    manifest = read(SERVICE)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    check_cluster(manifest["spec"]["rayClusterConfig"])
    (application,) = ServeDeploySchema(**yaml.safe_load(manifest["spec"]["serveConfigV2"])).applications
    example = importlib.import_module(application.import_path.partition(":")[0])
    assert example.Arguments(**application.args).storage_path == "/results"
    (deployment,) = application.deployments
    assert deployment.name == example.Server.name
    (worker,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    cpus = int(worker["resources"]["limits"]["cpu"])
    assert cpus == deployment.num_replicas * deployment.ray_actor_options.num_cpus + 1


def check_cluster(cluster: dict[str, Any]) -> None:
    """Check the pods of a cluster."""
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        mounts = {mount["name"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert mounts == {"results"}
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_kubernetes_waits_for_longer_than_a_drain_takes() -> None:
    for group in read(MANIFEST)["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        values = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] >= float(values[DRAIN_TIMEOUT]) + 30
    assert hasattr(ray_constants, DRAIN_TIMEOUT)  # Ray's own name of the variable


@pytest.mark.parametrize("job", ["train", "tune"])
def test_the_manifest_continues_a_run_and_its_flags_are_known(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / MANIFEST).read_text().replace("\n#", "\n").replace("\n ", "\n")  # one is in a comment, for a sweep
    (command,) = re.findall(rf"python (jobs/{job}\.py (?:.|\n)+? /results)", text)
    path, *flags = shlex.split(command)
    assert flags[:3] == ["--resume", "auto", "--run-name"]
    monkeypatch.setattr("sys.argv", [path, *flags[4:], "--resume"])
    assert cli.status_of(lambda: cli.call(cli.COMMANDS[job])) == 2
    # All flags are known: the error is about the added one.
    assert capsys.readouterr().err == "error: --resume needs --run-name NAME\n"


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


def pins() -> list[str]:
    return (ROOT / "deploy" / "constraints.txt").read_text().splitlines()[1:]


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/Dockerfile"])
def test_clusters_get_the_versions_that_were_tested_which_the_package_accepts(name: str) -> None:
    installs = re.findall(r"^[^#\n]*pip install.*", (ROOT / name).read_text(), re.MULTILINE)
    assert len(installs) == 2
    assert all("constraints.txt" in install for install in installs)
    accepted = {needed.name: needed for needed in map(Requirement, requires("mnist_ray") or ()) if not needed.marker}
    for pin in map(Requirement, pins()):
        (version,) = pin.specifier
        assert version.version in accepted[pin.name].specifier


SLURM_FAKES = {
    "bin/scontrol": """case $1 in show) printf 'node-7\\nnode-8\\n';; *) echo "scontrol $*";; esac""",
    "bin/srun": """case "$*" in *get_node_ip_address*) echo 10.0.0.7; exit;; esac
        printf '%s|' "$@"; echo
        while [ "$1" != -- ]; do shift; done; shift; exec "$@" """,
    "bin/python": """trap 'echo "saved a checkpoint"; exit 130' TERM
        echo "training"
        while [ "$JOB_STATUS" = none ]; do sleep 0.05; done
        exit "$JOB_STATUS" """,
    ".venv/bin/activate": "",
}


@pytest.fixture
def start_on_slurm(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start deploy/slurm.sh among stand-ins for Slurm's commands and for the job."""
    for name, body in SLURM_FAKES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    allotted = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    allotted |= {"SLURM_JOB_ID": "42", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    started = []

    def start(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
        env = {**os.environ, **allotted, **variables}
        command = [str(ROOT / "deploy" / "slurm.sh"), *arguments]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("variables", "gpus"), [({}, "0"), ({"SLURM_GPUS_PER_NODE": "2"}, "2"), ({"SLURM_GPUS_PER_NODE": "a100:4"}, "4")]
)
def test_on_slurm_ray_spans_the_nodes_and_the_job_gets_the_arguments(
    variables: dict[str, str], gpus: str, start_on_slurm: Callable[..., "subprocess.Popen[str]"]
) -> None:
    script = start_on_slurm("--num-workers", "4", "--run-name", "a b", JOB_STATUS="0", **variables)
    printed, _ = script.communicate()
    failing = start_on_slurm(JOB_STATUS="3")
    assert "requeue" not in failing.communicate()[0], "a job that fails is not queued again"
    assert failing.returncode == 3
    arguments = printed.splitlines()[0].split("|")[:-1]
    separator = arguments.index("--")
    assert arguments[:separator] == [
        *("--cpus-per-task", "8", "ray", "symmetric-run", "--address", "10.0.0.7:6379", "--min-nodes", "2"),
        *("--num-cpus", "8", "--num-gpus", gpus),
    ]
    assert arguments[arguments.index("python") :] == [
        *("python", "jobs/train.py", "--resume", "auto", "--run-name", "mnist-ray-42"),
        *("--num-workers", "4", "--run-name", "a b"),
    ]
    assert script.returncode == 0


def test_before_slurms_time_limit_the_job_saves_a_checkpoint_and_is_queued_again(
    start_on_slurm: Callable[..., "subprocess.Popen[str]"],
) -> None:
    script = start_on_slurm(JOB_STATUS="none")
    assert script.stdout is not None
    assert "training\n" in iter(script.stdout.readline, "")
    script.send_signal(signal.SIGUSR1)
    printed, _ = script.communicate(timeout=60)
    assert printed.splitlines() == ["saved a checkpoint", "scontrol requeue 42"]


def test_the_runtime_environment_has_all_dependencies_in_the_versions_that_were_tested() -> None:
    needed = {need.name: need for need in map(Requirement, requires("mnist_ray") or ()) if not need.marker}
    given = {need.name: need.specifier for need in map(Requirement, read("deploy/runtime-env.yaml")["pip"])}
    pinned = {pin.name: pin.specifier for pin in map(Requirement, pins()) if pin.name != "ray"}  # the nodes have Ray
    for name, need in needed.items():
        if name != "ray":
            expected = pinned.get(name, need.specifier)
            assert given.get(name) == expected, f"write {name}{expected} into deploy/runtime-env.yaml, too"


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The ends that EC2's metadata service announces, an answer each, in seconds since 1970; None: no notice."""
    ends: list[float | None] = []

    def answer(request: Request, timeout: float) -> io.BytesIO:
        service, _, path = request.full_url.partition("/latest/")
        assert service == "http://169.254.169.254"
        if path == "api/token":
            assert (request.method, request.get_header("X-aws-ec2-metadata-token-ttl-seconds")) == ("PUT", "60")
            return io.BytesIO(b"a token")
        assert path == "meta-data/spot/instance-action"
        assert request.get_header("X-aws-ec2-metadata-token") == "a token"
        end_s = ends.pop(0)
        if end_s is None:
            raise HTTPError(request.full_url, 404, "Not Found", Message(), None)
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end_s))
        return io.BytesIO(json.dumps({"action": "terminate", "time": end}).encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    return ends


def test_a_notice_drains_the_ray_node_of_the_spot_instance(
    notices: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    notices += [None, None, 0]  # its time is over: no seconds are left
    node = {"address": "10.0.0.1:6379", "node_id": "ab" * 28}
    raylet = ["raylet", f"--gcs-address={node['address']}", f"--node_id={node['node_id']}"]
    processes = [Mock(info={"cmdline": command}) for command in (None, ["bash"], raylet)]
    monkeypatch.setattr("psutil.process_iter", lambda attributes: processes)
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: called.append(command))
    runpy.run_path(str(ROOT / SPOT_SCRIPT), run_name="__main__")
    ((program, name, *flags),) = called
    assert (program, name) == ("ray", scripts.drain_node.name)
    params = scripts.drain_node.make_context("drain-node", flags).params  # Ray's own parser takes all flags
    expected = {**node, "reason": "DRAIN_NODE_REASON_PREEMPTION", "deadline_remaining_seconds": 0}
    assert params | expected == params
    assert slept == [5, 5]
