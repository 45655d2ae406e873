"""Compare jobs with the same training in other frameworks.

    python benchmarks/frameworks.py mnist DATA_DIR --rounds 1       # 7 minutes on two cores
    python benchmarks/frameworks.py gpt DATA_DIR --rounds 1 ARGS    # 9 minutes, with the ARGS below
    python benchmarks/frameworks.py table - --rounds 1              # 90 s

Guards the speed of a job beside Lightning and a plain loop, its few lines to write, its restart after a kill, and, with
``--busy``, its speed beside other work.

``mnist``: DATA_DIR has torchvision's layout. In each round, every program trains with one process, with two, and with
two of which one is killed (SIGKILL) a second after the first epoch's checkpoint.

``gpt``: DATA_DIR has texts, on which every program trains examples/gpt.py with one process. ARGS are passed to each
program: ``--num-steps 60 --depth 6 --width 384 --precision bf16``, perhaps ``--validation-size 100``.

``table``: 100,000 rows of 20 numbers and a small network, in batches of 32, with one process.

All programs of a job have the same validation and the same test.

Needs `pip install lightning`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from before import busy, training_workers

HERE = Path(__file__).parent
PEERS, TRAIN, EXAMPLE = HERE / "peers", HERE.parent / "jobs" / "train.py", HERE.parent / "examples" / "gpt.py"
Figures = dict[str, float]
_HANG_S = 900.0


@dataclass(frozen=True)
class Framework:
    """A program that trains with the default recipe, in its framework."""

    name: str
    script: Path
    flags: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    """What the other programs import from the script, so that its lines do not count."""

    def command(self, data: Path, folder: Path, processes: int) -> list[object]:
        """Return the arguments of Python: what starts the training, or continues it in the same folder."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", 3]
        return [*(launcher if processes > 1 else ()), self.script, data, folder, *self.flags]

    def second_process(self, job: psutil.Process) -> psutil.Process:
        """Return one of two training processes."""
        process: psutil.Process = job.children()[-1]
        return process

    @property
    def text(self) -> str:
        """The code that a user writes."""
        return self.script.read_text(encoding="utf-8")

    def outcome(self, printed: str, folder: Path) -> Figures:
        """Return the training's rate, and the accuracy or the loss."""
        figures: Figures = json.loads(printed.strip().rpartition("\n")[2])
        return figures


@dataclass(frozen=True)
class MnistRay(Framework):
    """This project, with a workload."""

    data_flag: str = "--images"

    def command(self, data: Path, folder: Path, processes: int) -> list[object]:
        """Return the arguments of Python."""
        run = ["--storage-path", folder, "--run-name", "run", *(["--resume"] if (folder / "run").exists() else [])]
        of_data = [self.data_flag, data] if self.data_flag else []
        return [TRAIN, "--workload", self.script, *of_data, "--num-workers", processes, *run, *self.flags]

    def second_process(self, job: psutil.Process) -> psutil.Process:
        """Return a training worker."""
        return training_workers(job)[-1]

    def outcome(self, printed: str, folder: Path) -> Figures:
        """Read the run's files."""
        rates = [float(row["examples_per_s"]) for row in epochs(folder / "run")]
        accuracy = json.loads((folder / "run" / "result.json").read_text())["test_accuracy"]
        return {"images_per_s": statistics.harmonic_mean(rates), "accuracy": accuracy}


@dataclass(frozen=True)
class StepsInMnistRay(MnistRay):
    """This project, with a workload whose steps are timed, except for those of the first epoch."""

    def outcome(self, printed: str, folder: Path) -> Figures:
        """Read the run's files."""
        _, *warm = epochs(folder / "run")
        batch_size = json.loads((folder / "run" / "config.json").read_text())["batch_size"]
        loss = json.loads((folder / "run" / "result.json").read_text())["test_loss"]
        rate = statistics.harmonic_mean(float(row["examples_per_s"]) for row in warm)
        return {"steps_per_s": rate / batch_size, "loss": loss}


class GptInMnistRay(MnistRay):
    """This project, with the example."""

    def outcome(self, printed: str, folder: Path) -> Figures:
        """Read the run's files. The first epoch, a tenth of the steps, is not timed."""
        _, *warm = epochs(folder / "run")
        length = json.loads((folder / "run" / "config.json").read_text())["length"]
        rate = statistics.harmonic_mean(float(row["examples_per_s"]) for row in warm)
        tested = json.loads((folder / "run" / "result.json").read_text())["test_loss"]
        return {"tokens_per_s": rate * length, "loss": float(warm[-1]["val_loss"]), "test_loss": tested}


def epochs(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Job:
    """A training that several programs do."""

    frameworks: tuple[Framework, ...]
    settings: tuple[str, ...]
    rows: Mapping[str, str]
    """Figures, and their names in the table."""
    values: frozenset[str] = frozenset()
    """Figures that are no times or rates: the table has no ratios of them."""


MNIST = (
    MnistRay("mnist_ray", PEERS / "with_mnist_ray.py"),
    Framework("Lightning", PEERS / "with_lightning.py"),
)
GPT = (
    GptInMnistRay(
        "mnist_ray",
        EXAMPLE,
        shared=frozenset({"Settings", "Block", "GPT", "corpus_of", "load_data", "create_model", "create_optimizer"}),
        data_flag="--text-folder",
    ),
    Framework("a plain loop", PEERS / "gpt_plain.py"),
    Framework("Lightning", PEERS / "gpt_lightning.py"),
)
TABLE = (
    StepsInMnistRay("mnist_ray", PEERS / "table_mnist_ray.py", data_flag=""),
    Framework("a plain loop", PEERS / "table_plain.py"),
    Framework("Lightning", PEERS / "table_lightning.py"),
)
STEPS = {
    "one_steps_per_s": "steps/s in training",
    "one_s": "seconds from start to exit",
    "one_loss": "loss on the test set",
}
JOBS = {
    "table": Job(TABLE, ("one",), STEPS, frozenset({"one_loss"})),
    "mnist": Job(
        MNIST,
        ("one", "two", "killed"),
        {
            "one_s": "seconds from start to exit, 1 process",
            "two_s": "the same, 2 processes",
            "killed_s": "the same, 2 processes, one of them killed",
            "killed_starts": "starts of this run",
            "kill_s": "seconds that the kill cost",
            "one_images_per_s": "images/s in training, 1 process",
            "two_images_per_s": "the same, 2 processes",
            "one_accuracy": "accuracy on the test set, 1 process",
        },
        frozenset({"killed_starts", "kill_s", "one_accuracy"}),
    ),
    "gpt": Job(
        GPT,
        ("one",),
        {
            "one_tokens_per_s": "tokens/s in training",
            "one_s": "seconds from start to exit",
            "one_loss": "loss on the validation set",
            "one_test_loss": "loss on the test set",
        },
        frozenset({"one_loss", "one_test_loss"}),
    ),
}


def start(framework: Framework, data: Path, folder: Path, processes: int, flags: Sequence[str]) -> psutil.Popen:
    """Start a program."""
    command = [sys.executable, *map(str, framework.command(data, folder, processes)), *flags]
    # Without the variable, restarted processes find the addresses of the dead ones: pytorch/pytorch#135712
    environment = {**os.environ, "RAY_ADDRESS": "local", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def train(framework: Framework, data: Path, setting: str, flags: Sequence[str]) -> Figures:
    """Train with ``one`` process, with ``two``, or with two of which one is ``killed``. Start it again if it fails.

    Returns the program's outcome, the seconds from the first start to the last exit, and the number of starts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.perf_counter()
        for starts in range(1, 4):
            job = start(framework, data, folder, 1 if setting == "one" else 2, flags)
            if setting == "killed" and starts == 1:
                while not any(folder.rglob("*epoch*")) and job.poll() is None:
                    time.sleep(0.1)
                time.sleep(1)
                framework.second_process(job).kill()
            try:
                printed, _ = job.communicate(timeout=_HANG_S)
            except subprocess.TimeoutExpired:
                print(f"{framework.name}, {setting}: hangs; killed after {_HANG_S:.0f} s", flush=True)
                for process in (*job.children(recursive=True), job):
                    process.kill()
                continue
            if job.returncode == 0:
                seconds = time.perf_counter() - begun
                return {"s": seconds, "starts": starts, **framework.outcome(printed, folder)}
    raise RuntimeError(f"{framework.name}, {setting}: failed {starts} times")


def lines_to_write(framework: Framework) -> int:
    """Return the number of lines without blank lines, docstrings, what is shared, and lines that measure."""
    text = framework.text
    without: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_shared = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in framework.shared
        if isinstance(node, ast.stmt) and (is_docstring or is_shared):
            without |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    without |= {n for n, line in enumerate(text.splitlines(), 1) if re.search(r"[Cc]lock|^\s*$", line)}
    return len(text.splitlines()) - len(without)


def as_markdown(job: Job, rounds: Sequence[dict[str, Figures]]) -> list[str]:
    """Return the lines of a table: medians, and the least and the greatest ratio of a round to this project."""
    ours = job.frameworks[0].name

    def cell(name: str, figure: str) -> str:
        shown = f"{statistics.median(figures[name][figure] for figures in rounds):,.4g}"
        ratios = [figures[name][figure] / figures[ours][figure] for figures in rounds]
        has_ratio = name != ours and figure not in job.values
        return f"{shown} ({min(ratios):.2f} to {max(ratios):.2f} ×)" if has_ratio else shown

    lines = [
        f"| | {' | '.join(framework.name for framework in job.frameworks)} |",
        "|---" * (len(job.frameworks) + 1) + "|",
        f"| lines to write | {' | '.join(str(lines_to_write(framework)) for framework in job.frameworks)} |",
    ]
    for figure, title in job.rows.items():
        if figure in rounds[0][ours]:
            lines.append(f"| {title} | {' | '.join(cell(framework.name, figure) for framework in job.frameworks)} |")
    return lines


def compare(job: Job, data: Path, num_rounds: int, flags: Sequence[str]) -> list[str]:
    """Run all programs in each round; print every figure, and return the table's lines."""
    if not importlib.util.find_spec("lightning"):
        return ["to compare with Lightning, pip install lightning"]
    rounds: list[dict[str, Figures]] = []
    for number in range(num_rounds):
        rounds.append({framework.name: {} for framework in job.frameworks})
        for setting, framework in itertools.product(job.settings, job.frameworks):
            figures = train(framework, data, setting, flags)
            rounds[-1][framework.name] |= {f"{setting}_{name}": value for name, value in figures.items()}
            if setting == "killed":
                rounds[-1][framework.name]["kill_s"] = figures["s"] - rounds[-1][framework.name]["two_s"]
            shown = ", ".join(f"{name} {value:,.6g}" for name, value in figures.items())
            where = f"round {number + 1}/{num_rounds}, load {os.getloadavg()[0]:.1f}"
            print(f"{where}: {framework.name}, {setting}: {shown}", flush=True)
    return as_markdown(job, rounds)


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=("one", "two", "killed"), default=(), help="only these")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile")
    args, flags = parser.parse_known_args()
    job = JOBS[args.job]
    with busy(args.busy):
        print("\n".join(compare(replace(job, settings=args.settings or job.settings), args.data, args.rounds, flags)))


if __name__ == "__main__":
    main()
