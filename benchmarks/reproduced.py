"""Check that a run trained again by ``reproduce`` has the same bits, or that what differs is named.

    python benchmarks/reproduced.py     # 7 minutes on two cores

Guards a run's record of its origin.

Trains small runs of MNIST and of the examples, from a repository of its own. Then changes one thing at most (a file, a
commit, the data, what the run's files say of versions or the processor, the number of workers), and reproduces the
run. Prints a line for each case: the differences that were named, and whether the weights were the same. Exits with
status 1 unless exactly the changed thing was named, and the weights were the same wherever they must be.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from before import ROOT

HERE = ["--num-workers", "0"]
TWO_WORKERS = ["--num-workers", "2", "--cpus-per-worker", "1"]
MNIST = ["--num-epochs", "1", "--limit", "0.05"]
HELPED = "import diabetes\n\n\nclass Helped(diabetes.Diabetes):\n    pass\n"


@dataclass(frozen=True)
class Project:
    """A repository with the examples and a copy of MNIST's data, and a storage path beside it."""

    folder: Path

    @property
    def code(self) -> Path:
        """The repository."""
        return self.folder / "code"

    @property
    def storage(self) -> Path:
        """The storage path."""
        return self.folder / "runs"

    def make(self) -> None:
        """Make the repository, with one commit."""
        for name in ("diabetes.py", "shapes.py", "digits.py"):
            self.code.mkdir(exist_ok=True)
            shutil.copy(ROOT / "examples" / name, self.code)
        shutil.copytree(ROOT / "mnist_ray" / "mnist" / "data", self.code / "data")
        (self.code / "helped.py").write_text(HELPED)
        (self.code / "notes.txt").write_text("one\n")
        (self.code / ".gitignore").write_text("__pycache__\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.commit()

    def git(self, *words: str) -> None:
        """Run git in the repository."""
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=self.code, check=True)

    def commit(self) -> None:
        """Commit what is staged, or nothing."""
        self.git("commit", "--quiet", "--allow-empty", "--message", "some")

    def restore(self) -> None:
        """Undo all changes to files."""
        self.git("checkout", "--quiet", "--", ".")

    def run(self, job: str, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run a job in the repository's folder."""
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags, "--storage-path", str(self.storage)],
            cwd=self.code,
            env={**os.environ, "RAY_ADDRESS": "local"},
            capture_output=True,
            text=True,
            check=False,
        )


Edit = Callable[[Project, Path], object]
"""Changes the project, or the files of the run in a folder."""


@dataclass(frozen=True)
class Case:
    """A run, a change after it, and what must be found."""

    name: str
    train: list[str]
    edit: Edit = lambda project, run: None
    named: frozenset[str] = frozenset()
    same: bool | None = True  # None: either is right
    before: Edit = lambda project, run: None
    again: tuple[str, ...] = ()  # flags of reproduce


def append(name: str, text: str) -> Edit:
    """Return an edit that appends a text to a file of the repository."""

    def edit(project: Project, run: Path) -> None:
        with open(project.code / name, "a", encoding="utf-8") as file:
            file.write(text)

    return edit


def pretend(file_name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Return an edit that changes one of a run's JSON files."""

    def edit(project: Project, run: Path) -> None:
        values = json.loads((run / file_name).read_text())
        change(values)
        (run / file_name).write_text(json.dumps(values))

    return edit


def change_label(project: Project, run: Path) -> None:
    """Change a byte of the training labels."""
    (file,) = (project.code / "data").glob("train-labels*")
    is_gzipped = file.suffix == ".gz"
    content = bytearray(gzip.decompress(file.read_bytes()) if is_gzipped else file.read_bytes())
    for index in range(8, len(content)):  # all, as --limit draws a few
        content[index] = (content[index] + 1) % 10
    file.write_bytes(gzip.compress(content, 1) if is_gzipped else content)


def change_package(project: Project, run: Path) -> None:
    """Pretend that the run had another version of Pillow."""
    file = run / "packages.txt"
    file.write_text(re.sub(r"(?im)^pillow==.*$", "pillow==1.0", file.read_text()))


CASES = [
    Case("MNIST", [*HERE, *MNIST]),
    Case("MNIST, fp32", [*HERE, *MNIST, "--precision", "fp32"]),
    Case("MNIST, SGD, EMA, clipping", [
        *HERE, *MNIST, "--optimizer", "sgd", "--ema-decay", "0.9", "--clip-grad-norm", "1",
    ]),
    Case("MNIST, from a run's weights", [*HERE, *MNIST, "--init-from", "MNIST"]),
    Case("diabetes.py, with dropout", [*HERE, "--workload", "diabetes.py", "--num-epochs", "5"]),
    Case("shapes.py, augmented", [*HERE, "--workload", "shapes.py", "--num-epochs", "1", "--num-images", "600"]),
    Case("digits.py, augmented", [*HERE, "--workload", "digits.py", *MNIST]),
    Case("MNIST, 2 workers", [*TWO_WORKERS, *MNIST]),
    Case("MNIST, --reproducible, 2 workers", [*TWO_WORKERS, *MNIST, "--reproducible"]),
    Case("the same, on 1 worker", [*TWO_WORKERS, *MNIST, "--reproducible"], again=("--num-workers", "1")),
    Case("a dirty tree", [*HERE, *MNIST], before=append("notes.txt", "two\n")),
    Case("MNIST, on 1 worker, not 2", [*TWO_WORKERS, *MNIST], named=frozenset({"workers"}), same=None,
         again=("--num-workers", "1")),
    Case("the workload's file changed", [*HERE, "--workload", "diabetes.py", "--num-epochs", "5"],
         append("diabetes.py", "\nDiabetes.loss = Regression.loss\n"), frozenset({"code", "repository"}), same=False),
    Case("a module changed", [*HERE, "--workload", "helped.py", "--num-epochs", "5"],
         append("diabetes.py", "\nDiabetes.loss = Regression.loss\n"), frozenset({"code", "repository"}), same=False),
    Case("an uncommitted change", [*HERE, *MNIST], append("notes.txt", "two\n"), frozenset({"repository"})),
    Case("a new commit", [*HERE, *MNIST], lambda project, run: project.commit(), frozenset({"repository"})),
    Case("changed data", [*HERE, *MNIST, "--data-dir", "data"], change_label, frozenset({"data", "repository"}),
         same=False),
    Case("another torch, pretended", [*HERE, *MNIST],
         pretend("origin.json", lambda origin: origin["versions"].update(torch="1.0")), frozenset({"versions"})),
    Case("another package, pretended", [*HERE, *MNIST], change_package, frozenset({"packages"})),
    Case("another processor, pretended", [*HERE, *MNIST],
         pretend("origin.json", lambda origin: origin["arithmetic"].update(caches=["1K"])), frozenset({"processor"})),
]  # fmt: skip


def check(project: Project, case: Case) -> bool:
    """Train and reproduce; print a line; return whether what was found is right."""
    name = re.sub(r"\W+", "_", case.name)
    run = project.storage / name
    case.before(project, run)
    trained = project.run("train", *case.train, "--run-name", name)
    if trained.returncode:
        print(f"{case.name}: {trained.stderr}")
        return False
    case.edit(project, run)
    done = project.run("reproduce", name, *case.again)
    project.restore()
    named = {*re.findall(r"^differs    (\w+):", done.stdout, re.MULTILINE)}
    *_, last = done.stdout.splitlines() or [""]
    same = last.endswith(": the same as " + f"{name}'s, bit for bit")
    if "workers (" in last:
        named.add("workers")
    is_known = same or "possible reasons: " in last
    wanted = case.named if not same else case.named - {"workers"}
    is_right = is_known and named == wanted and case.same in (None, same) and done.returncode == (0 if same else 1)
    found = f"{', '.join(sorted(named)) or 'nothing'} differs, weights {'the same' if same else 'differ'}"
    print(f"{'right' if is_right else 'WRONG':6} {case.name:34} {found}", flush=True)
    if not is_right:
        print(done.stdout[-2000:], done.stderr, sep="\n")
    return is_right


def main() -> int:
    """Check all cases; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        project.make()
        num_right = sum(check(project, case) for case in CASES)
    print(f"{num_right} of {len(CASES)} as they must be")
    return 0 if num_right == len(CASES) else 1


if __name__ == "__main__":
    sys.exit(main())
