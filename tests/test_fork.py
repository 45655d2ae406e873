"""The commands in CONTRIBUTING.md that make a package of your own from this one leave a project that works."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT, copy_tracked_files


def run(command: str, folder: Path, variables: Mapping[str, str]) -> str:
    """Run a command in bash; return what it printed."""
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Variables for make: a new environment that finds the packages of this one, so that nothing is downloaded."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Packages are found in a folder that a .pth file names, but the .pth file of this package there is not read.
    (site_packages / "shared.pth").write_text(str(Path(pytest.__file__).parent.parent))
    for program in ("mypy", "ruff"):
        (environment / "bin" / program).symlink_to(Path(sys.executable).parent / program)
    return {
        "VENV": str(environment),
        "PYTHON": sys.executable,
        "PYTHONPATH": "",
        "PIP_NO_BUILD_ISOLATION": "1",  # setuptools is there, too
    }


def test_only_tests_that_a_fork_removes_read_the_docs() -> None:
    (names,) = re.findall(r"^rm -r tests/docs tests/test_{(.+)}\.py$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    tests = [file for file in ROOT.glob("tests/**/test_*.py") if file.parent.name != "docs"]
    readers = [file.stem for file in tests if 'ROOT / "docs"' in file.read_text()]
    assert readers
    assert {*readers} <= {f"test_{name}" for name in names.split(",")}


@pytest.mark.long
def test_a_fork_trains_and_passes_its_checks_and_tests(tmp_path: Path, variables: dict[str, str]) -> None:
    fork = copy_tracked_files(tmp_path / "fork")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(rm .+?)```", page, re.DOTALL)
    run(commands, fork, variables)
    left = subprocess.run(
        ["grep", "-rniE", "--include=*.py", "--include=*.toml", "mnist[-_]ray", fork], capture_output=True, text=True
    )
    assert left.stdout == ""
    for source in re.findall(r"^COPY (.+) \S+$", (fork / "deploy" / "Dockerfile").read_text(), re.MULTILINE):
        assert all((fork / path).exists() for path in source.split()), source
    for file in (".ci/run", ".github/workflows/ci.yml"):
        targets = re.findall(r"make ([\w-]+)", (fork / file).read_text())
        assert len(targets) >= 4
        assert all(re.search(rf"^{target}:", (fork / "Makefile").read_text(), re.MULTILINE) for target in targets)
    trained = run(f"make train ARGS='--storage-path {tmp_path}/runs'", fork, variables)
    assert re.search(r"^test +accuracy 9[89]\.", trained, re.MULTILINE)
    run("make check", fork, variables)
    assert " failed" not in run("make test", fork, variables)
