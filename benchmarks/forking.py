"""Measure the start and the memory of Ray's workers, started by Ray and forked.

    python benchmarks/forking.py               # about 2 minutes on two cores
    python benchmarks/forking.py --cluster     # about 2 minutes

Guards ray_fork: a worker starts in tenths of a second, and shares the memory of what it imports. Fails if a worker is
not forked.

Each round starts a driver that lets Ray start the workers, and one that has them forked, on a local Ray of their own;
with ``--cluster``, on one that `ray start --head` has started for all rounds. A driver starts an actor, which imports a
module, and waits for its answer: once, then ``--workers`` times. Ray starts no workers in advance. Prints medians and
ranges. Needs only ray_fork and Ray, so that it also runs with other versions of Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_fork.starting import prepared_forking, runtime_env_to_fork

ROOT = Path(__file__).parent.parent


class Actor:
    """A worker that needs a module."""

    def look(self, module: str) -> tuple[bool, float]:
        """Import the module. Return whether this process was forked, and its unique memory (USS) in MiB."""
        importlib.import_module(module)
        is_forked = "ray_fork.server" in Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8")
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        return is_forked, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def drive(address: str, module: str, num_workers: int, is_forked: bool) -> dict[str, Any]:
    """Start workers one after the other; return the seconds that each took, and their memory."""
    os.environ["RAY_ADDRESS"] = address
    with prepared_forking(module, is_wanted=is_forked) as forking:
        import ray

        from ray_fork.ray_internals import shim_in_local_ray

        if address == "local":
            with shim_in_local_ray(forking):
                ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, runtime_env=runtime_env_to_fork(forking), log_to_driver=False)
        actor_class, actors, seconds, memory = ray.remote(Actor).options(num_cpus=0), [], [], []
        for _ in range(1 + num_workers):
            start = time.perf_counter()
            actors.append(actor_class.remote())
            was_forked, mib = ray.get(actors[-1].look.remote(module))
            seconds.append(time.perf_counter() - start)
            memory.append(mib)
            assert was_forked == is_forked, f"a worker was {'not ' * is_forked}forked; see raylet.err in Ray's logs"
        ray.shutdown()
    return {"first": seconds[:1], "seconds": seconds[1:], "MiB": memory[1:], "ray": ray.__version__}


@contextlib.contextmanager
def cluster(folder: str, variables: dict[str, str]) -> Iterator[str]:
    """Run `ray start --head`, with its files in a folder; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
    pipe, same = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=variables, stdout=pipe, stderr=same, text=True) as head:
        assert head.stdout is not None
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            sys.exit("".join(said))
        try:
            import ray

            yield f"{ray.util.get_node_ip_address()}:{port}"
        finally:
            head.terminate()
            head.communicate()


def main() -> None:
    """Print the medians of both kinds of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", action="store_true", help="on a Ray from `ray start`, not a local one")
    parser.add_argument("--module", default="torch", help="what each worker imports")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        address, kind = arguments.driver
        print(json.dumps(drive(address, arguments.module, arguments.workers, kind == "forked")))
        return
    found: dict[str, list[dict[str, Any]]] = {"as usual": [], "forked": []}
    with contextlib.ExitStack() as at_the_end:
        folder = at_the_end.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
        variables = {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        variables |= {"RAY_prestart_worker_first_driver": "0", "RAY_AUTH_MODE": "disabled"}
        address = at_the_end.enter_context(cluster(folder, variables)) if arguments.cluster else "local"
        for _ in range(arguments.rounds):
            for kind in found:
                command = [sys.executable, __file__, "--module", arguments.module, "--workers", str(arguments.workers)]
                command += ["--driver", address, kind]
                done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE)
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"Ray {found['forked'][0]['ray']}, {'a cluster' if arguments.cluster else 'a local Ray'}, {arguments.module}")
    for name, key in (("s, the first worker", "first"), ("s, each later one", "seconds"), ("MiB of its own", "MiB")):
        for kind, rounds in found.items():
            values = [value for one in rounds for value in one[key]]
            print(f"{name:20} {kind:8} {statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
