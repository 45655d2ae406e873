"""A run is trained again, and what differs is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_ray import provenance
from mnist_ray.errors import UsageError
from mnist_ray.job.job import Job
from tests.conftest import callback_at, run_main

WORKLOAD = """
from pathlib import Path

import numpy as np
from torch import nn

import line_helper
from mnist_ray.workload import Arrays, Data, Regression

class Line(Regression):
    def load_data(self):
        inputs = np.load(Path(__file__).with_name("inputs.npy"))
        return Data(Arrays(inputs, inputs.sum(1)), Arrays(inputs, inputs.sum(1)), name="line")
    def create_model(self): return nn.Linear(3, 1)
    def prepare(self, inputs, generator): return line_helper.as_floats(inputs)
"""
SAME = "same       code, data, repository, versions, packages, processor\n"


class Project:
    """A folder with a repository, a workload, its data, and a finished run in another folder."""

    def __init__(self, folder: Path) -> None:
        self.code, self.storage = folder / "code", folder / "storage"
        self.workload, self.helper = self.code / "line.py", self.code / "line_helper.py"

    @property
    def run(self) -> Path:
        return self.storage / "run"

    def reproduce(self, *flags: str, run: str | None = None) -> int | None:
        return run_main("reproduce", run or "run", "--storage-path", str(self.storage), *flags)

    def edit(self, file: str, **changes: Any) -> None:
        """Change values of one of the run's JSON files."""
        path = self.run / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def origin(self) -> dict[str, Any]:
        origin: dict[str, Any] = json.loads((self.run / "origin.json").read_text())
        return origin


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.code.mkdir()
    project.workload.write_text(WORKLOAD)
    project.helper.write_text("def as_floats(inputs): return inputs.float()\n")
    np.save(project.code / "inputs.npy", np.random.default_rng(0).normal(size=(60, 3)))
    (project.code / ".gitignore").write_text("__pycache__\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", *words], cwd=project.code, check=True)
    flags = ["--workload", str(project.workload), "--storage-path", str(project.storage), "--run-name", "run"]
    run_main("train", *flags, "--num-workers", "0", "--num-epochs", "1")
    return project


@pytest.fixture
def project(trained: Project, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trained project, as it was after each test."""
    kept = trained.code.with_name("kept")
    shutil.copytree(trained.code.parent, kept, symlinks=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(trained.code)])
    yield trained
    for folder in (trained.code, trained.storage):
        shutil.rmtree(folder)
        shutil.copytree(kept / folder.name, folder)
    shutil.rmtree(kept)


def test_a_program_of_the_environment_is_no_module_of_a_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    program = types.ModuleType("program")
    program.__file__ = f"{sys.prefix}/bin/mnist-ray"
    monkeypatch.setitem(sys.modules, "program", program)
    assert provenance.modules_below(Path(sys.prefix), Path("none")) == {}


def test_a_run_records_its_code_its_packages_and_its_repository(trained: Project) -> None:
    origin = trained.origin()
    code, repository = origin["code"], origin["code"]["repository"]
    assert [*code["modules"]] == ["line_helper.py"]
    assert repository["folder"] == str(trained.code)
    assert (repository["changes_sha256"], repository["untracked"], repository["num_untracked"]) == (None, {}, 0)
    assert len(repository["commit"]) == 40
    assert code["package_sha256"] == provenance.package_sha256()
    assert origin["arithmetic"] == provenance.arithmetic()
    packages = (trained.run / "packages.txt").read_text().splitlines()
    assert f"torch=={provenance.versions()['torch']}" in packages
    assert not (trained.run / "changes.diff").exists()


def test_a_reproduced_run_has_the_same_weights_and_a_name_of_its_own(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.reproduce() == 0
    said = capsys.readouterr().out
    digest = json.loads((project.run / "result.json").read_text())["weights_sha256"]
    assert said.startswith(SAME)
    assert said.endswith(f"weights    SHA-256 {digest}: the same as run's, bit for bit\n")
    (again,) = [folder for folder in project.storage.iterdir() if folder.name.startswith("run_again_")]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (project.run, again))
    assert {**before, "cpus_per_worker": after["cpus_per_worker"]} == after


def test_other_weights_are_reported_with_the_differences_as_reasons_and_status_1(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = "1 × cpu with 99 threads, fp32"
    project.edit("result.json", weights_sha256="0" * 64, workers=f"{workers} (a processor on a host)")
    project.edit("origin.json", versions={**project.origin()["versions"], "torch": "1.0"})
    assert project.reproduce() == 1
    said = capsys.readouterr().out
    now = provenance.versions()["torch"]
    assert said.startswith(
        f"differs    versions: torch 1.0 then, {now} now\nsame       code, data, repository, packages"
    )
    *_, last = said.splitlines()
    assert f", not {'0' * 64} as run; possible reasons: versions, workers ({workers} then, " in last
    assert last.endswith("now: without --reproducible, the number of workers and threads matters)")


def edit_helper(project: Project) -> None:
    project.helper.write_text(project.helper.read_text() + "# another\n")


def edit_workload(project: Project) -> None:
    project.workload.write_text(f"{WORKLOAD}\n# another\n")


def edit_data(project: Project) -> None:
    np.save(project.code / "inputs.npy", np.random.default_rng(1).normal(size=(60, 3)))


def edit_packages(project: Project) -> None:
    file = project.run / "packages.txt"
    others = {"safetensors": "0.0.1", "pillow": "0.0.2", "rich": "0.0.3", "psutil": "0.0.4", "pyarrow": "0.0.5"}
    lines = [line for line in file.read_text().splitlines() if line.partition("==")[0].lower() not in others]
    file.write_text("\n".join([*lines, *(f"{name}=={version}" for name, version in others.items()), "gone==1\x1b"]))


def edit_processor(project: Project) -> None:
    about = provenance.arithmetic()
    project.edit("origin.json", arithmetic={**about, "processor": [*about["processor"], "avx9000"]})


def edit_package(project: Project) -> None:
    project.edit("origin.json", code={**project.origin()["code"], "package_sha256": "0"}, git_commit="0123abcd")


def edit_commit(project: Project) -> None:
    code = project.origin()["code"]
    project.edit("origin.json", code={**code, "repository": {**code["repository"], "commit": "0123abcd"}})


def edit_untracked(project: Project) -> None:
    code, untracked = project.origin()["code"], {"inputs.npy": "0", "/dev/zero": "0", "../../up": "0"}
    project.edit("origin.json", code={**code, "repository": {**code["repository"], "untracked": untracked}})


def remove_repository(project: Project) -> None:
    shutil.rmtree(project.code / ".git")


def test_a_projects_settings_are_not_those_of_the_run(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = callback_at(tmp_path / "doubles.py", "on_gradients(self, state)", "1 / 0")
    (tmp_path / "pyproject.toml").write_text(f"[tool.mnist_ray]\ncallback = {str(callback)!r}\nnum_workers = 3\n")
    monkeypatch.chdir(tmp_path)
    assert project.reproduce() == 0
    assert "the same as run's, bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (edit_helper, ["code: 1 module (line_helper.py)", "repository: uncommitted changes (the run had none)"]),
        (edit_workload, ["code: line.py:Line", "repository: uncommitted changes ("]),
        (edit_data, ["data: training, validation, test of line", "repository: uncommitted changes ("]),
        (edit_packages, ["packages: 6: "]),
        (edit_processor, ["processor: processor avx9000 then, none now"]),
        (edit_package, ["code: mnist_ray itself (commit 0123abcd then, "]),
        (edit_commit, ["repository: commit 0123abcd then, "]),
        (edit_untracked, ["repository: 3 untracked files (inputs.npy, /dev/zero, ../../up)"]),
        (remove_repository, ["repository: there is none at {code}"]),
    ],
)
def test_what_differs_is_named_without_training(
    project: Project, edit: Callable[[Project], None], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project)
    assert project.reproduce("--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in said] == [*(["differs"] * len(lines)), "same"]
    for line, wanted in zip(said, lines, strict=False):
        assert line.startswith(f"differs    {wanted.format(code=project.code)}")
    assert [folder.name for folder in project.storage.iterdir()] == ["run"]


def test_a_run_of_an_older_version_is_compared_by_what_it_has(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = project.origin()
    for name in ("code", "arithmetic"):
        del origin[name]
    (project.run / "origin.json").write_text(json.dumps(origin))
    (project.run / "packages.txt").unlink()
    project.reproduce("--dry-run")
    unknown = "unknown    repository, packages, processor: the run has no record to compare with\n"
    assert capsys.readouterr().out == f"same       code, data, versions\n{unknown}"
    (project.run / "origin.json").unlink()
    project.reproduce("--dry-run")
    said = capsys.readouterr().out
    assert said.startswith("unknown    code, data, repository, versions, packages, processor: ")


def test_damaged_records_are_one_line_or_a_difference(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    code: dict[str, Any] = {"modules": ["a"], "callbacks": 3, "repository": "none", "package_sha256": {}}
    project.edit("origin.json", code=code, arithmetic={"processor": 5}, data={"training": 7})
    project.reproduce("--dry-run")
    assert "differs    code: the callbacks, mnist_ray itself" in capsys.readouterr().out


def test_an_unfinished_run_is_only_compared(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.run / "result.json").unlink()
    with pytest.raises(UsageError, match=r"run is not finished: it has no result\.json; --dry-run only compares"):
        project.reproduce()
    project.reproduce("--dry-run")
    assert capsys.readouterr().out == SAME


def test_a_result_without_a_digest_and_what_is_no_run_are_refused(project: Project) -> None:
    project.edit("result.json", weights_sha256=None)
    with pytest.raises(UsageError, match=r"result\.json has no weights_sha256, as an older version wrote it$"):
        project.reproduce()
    with pytest.raises(UsageError, match=r"nowhere is not a run, or is an unfinished sweep: it has no config\.json$"):
        project.reproduce(run="nowhere")


def test_for_a_sweep_the_run_to_name_is_said(project: Project) -> None:
    (project.run / "sweep.json").write_text("{}")
    remedy = rf"name a run, such as one that .*train.py --config {project.run}/best\.json has trained$"
    with pytest.raises(UsageError, match=rf"^{project.run} is a sweep; {remedy}"):
        project.reproduce()


def test_code_that_may_have_come_with_a_run_is_not_executed(project: Project, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    foreign = project.run / "foreign.py"
    foreign.write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n{WORKLOAD}")
    callback = callback_at(project.run / "calls.py", "on_step(self, state)", "pass")
    for name, values in {
        "--workload": {"workload": str(foreign)},
        "--callback": {"callback": str(callback)},
    }.items():
        before = (project.run / "config.json").read_text()
        project.edit("config.json", **values)
        with pytest.raises(UsageError, match=rf"config\.json names {name} .*, in a folder of runs: the code may have "):
            project.reproduce()
        (project.run / "config.json").write_text(before)
    assert not mark.exists()


def test_another_number_of_workers_may_be_asked_for(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Job]()

    def stop(job: Job, look_at: object) -> None:
        asked.append(job)
        raise ZeroDivisionError

    monkeypatch.setattr("mnist_ray.cli.train_job", stop)
    project.edit("config.json", num_workers=None)
    project.edit("result.json", num_workers=3, workers="3 × cpu with 1 thread, fp32 (a processor on a host)")
    for flags in ([], ["--num-workers", "2"]):
        with pytest.raises(ZeroDivisionError):
            project.reproduce(*flags)
    assert [(job.workers.num_workers, job.workers.cpus_per_worker) for job in asked] == [(3, 1), (2, 1)]
    assert asked[0].resume_with.startswith("python ")
    assert "--resume --run-name run_again_" in asked[0].resume_with
