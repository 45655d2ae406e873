"""Check that the tests of the core notice small faults.

    python benchmarks/mutations.py                 # 6 minutes on two cores
    python benchmarks/mutations.py --only 3 7      # two of the faults

Guards the tests of ``training/``, ``parallel/`` and ``data/``: each fault below, put into a copy of this version, makes
a test near it fail. Prints for each fault the first test that fails. Exits with status 1 if no test does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from before import checked_out, this_version
from faults import Fault, faulty_copy

TRAINER, STEP = "mnist_ray/training/trainer.py", "mnist_ray/training/step.py"
METRICS, WINDOW = "mnist_ray/training/metrics.py", "mnist_ray/training/window.py"
REPRODUCIBLE, READERS = "mnist_ray/parallel/reproducible.py", "mnist_ray/data/readers.py"
ORDER, SAMPLER = "mnist_ray/data/order.py", "mnist_ray/data/sampler.py"
TIME_LIMIT_S = 600.0
MUTATIONS = [
    (
        "training/test_engine",
        Fault(
            "the first average is not the weights",
            TRAINER,
            "is_first = state.epoch == state.step == 0",
            "is_first = False",
        ),
    ),
    (
        "training/test_steps",
        Fault("a pass begins with its second batch", TRAINER, "per_pass - first_step\n", "per_pass - first_step + 1\n"),
    ),
    (
        "training/test_step",
        Fault("a batch without weight has no gradient of zero", STEP, "torch.zeros_like(quotient)", "quotient"),
    ),
    (
        "training/test_engine training/test_steps",
        Fault("each step has the same dropout", STEP, ", number) + self._state.step", ", number)"),
    ),
    (
        "training/test_step",
        Fault("ranks divide by their own weights", STEP, "self._group.add_up(weight)", "weight.clone()"),
    ),
    (
        "training/test_engine training/test_step",
        Fault("a filler's loss counts", STEP, "factor = 0.0 if batch.is_filler else ", "factor = "),
    ),
    (
        "training/test_engine training/test_step",
        Fault(
            "a filler's sums count",
            STEP,
            "                if batch.is_filler:\n                    self._found = {",
            "                if False:\n                    self._found = {",
        ),
    ),
    (
        "training/test_step parallel/test_reproducible",
        Fault(
            "ranks start with buffers of their own",
            TRAINER,
            "(*state.model.parameters(), *state.model.buffers())",
            "state.model.parameters()",
        ),
    ),
    (
        "training/test_step",
        Fault("a closure's loss is one rank's", STEP, "self._group.add_up(total)", "total.clone()"),
    ),
    (
        "parallel/test_sharding training/test_engine",
        Fault(
            "a checkpoint of one rank's NaN is saved",
            TRAINER,
            "all(self.group.gathered(is_finite))",
            "is_finite",
        ),
    ),
    (
        "training/test_metrics training/test_engine",
        Fault(
            "an epoch's sums forget the earlier windows", METRICS, "self.sums.get(name, missing), values", "0.0, values"
        ),
    ),
    (
        "training/test_evaluation training/test_engine",
        Fault(
            "ranks validate with their own buffers",
            "mnist_ray/training/evaluation.py",
            "dist.broadcast(buffer, 0)",
            "buffer.clone()",
        ),
    ),
    (
        "training/test_engine",
        Fault("ranks close windows by their own clocks", WINDOW, "decision = parts[0].decision", "pass"),
    ),
    (
        "parallel/test_reproducible",
        Fault(
            "chunks inherit each other's buffers",
            REPRODUCIBLE,
            "            buffer.copy_(before)\n",
            "            buffer.copy_(buffer)\n",
        ),
    ),
    (
        "parallel/test_reproducible",
        Fault(
            "empty chunks count in the buffers' mean",
            REPRODUCIBLE,
            "change.double() / self._num_filled",
            "change.double() / self._num_chunks",
        ),
    ),
    (
        "training/test_step",
        Fault(
            "ranks take the losses of the first rank's rows",
            "mnist_ray/parallel/group.py",
            "slice(start, start + num_own)",
            "slice(0, num_own)",
        ),
    ),
    (
        "data/test_batches data/test_sampler",
        Fault("a drawn example's number is that of its slice", SAMPLER, "draw += bounds[0]\n", "draw += 0\n"),
    ),
    (
        "data/test_sampler training/test_step",
        Fault(
            "micro-batches are too few",
            SAMPLER,
            "math.ceil(largest / self.micro_batch_size)",
            "max(1, largest // self.micro_batch_size)",
        ),
    ),
    (
        "data/test_block_batches",
        Fault(
            "a block is forgotten that another stream needs",
            "mnist_ray/data/readers.py",
            "max(before.last_step, self._next.last_step)",
            "before.last_step",
        ),
    ),
    (
        "data/test_workload_data data/test_folds",
        Fault(
            "the first examples are held out",
            "mnist_ray/data/splits.py",
            "np.sort(Shuffled(len(split), [seed])[:size])",
            "np.arange(size)",
        ),
    ),
    (
        "data/test_batches",
        Fault("Python's generator is not seeded", READERS, "    random.seed(seed)\n", ""),
    ),
    (
        "data/test_draws data/test_order",
        Fault(
            "a drawn example is that before",
            ORDER,
            'drawn * self._edges[-1], side="right")',
            'drawn * self._edges[-1], side="right") - 1',
        ),
    ),
]
"""Test files near the fault, below tests/, and the fault."""


def noticing_test(names: str, fault: Fault, root: Path) -> str:
    """Return the first of the near tests that fails in a copy with the fault; empty if all pass."""
    tests = [f"tests/{name}.py" for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--numprocesses", "0", *tests]
    with faulty_copy(root, fault) as copy:
        environment = {**os.environ, "PYTHONPATH": str(copy), "RAY_ADDRESS": "local"}
        job = subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = job.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:  # ranks wait for each other
            return f"a test that does not end within {TIME_LIMIT_S:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    if job.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return found[1] if found else f"no test, but pytest exited with {job.returncode}: {said[-300:]}"


def main() -> int:
    """Try the faults; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, metavar="NUMBER", help="only these faults, counted from 1")
    numbers = parser.parse_args().only or range(1, len(MUTATIONS) + 1)
    start, unnoticed = time.monotonic(), 0
    with checked_out(this_version()) as root:
        assert root is not None
        for number in numbers:
            names, fault = MUTATIONS[number - 1]
            test = noticing_test(names, fault, root)
            unnoticed += not test
            print(f"{number:2} {fault}: {test or 'NO TEST NOTICES'}", flush=True)
    print(f"{len(numbers) - unnoticed} of {len(numbers)} noticed, {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
