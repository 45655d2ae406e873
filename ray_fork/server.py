"""The fork server: a process that imports the workers' modules once, and then forks Ray's workers from itself.

A fork copies only one thread, so the server has only one thread. It draws no random numbers, so that no two workers
draw the same numbers, and does not use CUDA. If an import breaks one of these rules, Ray starts workers as usual.

If the server's standard input is a pipe from its owner, the server exits with the owner. Otherwise it exits when it
has had no workers for a while.

python -m ray_fork.server SOCKET MODULE...
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_fork.shim import is_own, python_version

# Libraries read variables with these prefixes when they are loaded. A worker with different values cannot be forked.
_READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "LD_", "MALLOC_", "PYTHON")
_TAKES_EFFECT_LATER = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")
_FOR_IMPORTS = {
    # NumPy, SciPy and PyArrow would start threads.
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # PyTorch would look for GPUs through CUDA, which a fork could not use afterwards.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
_IMPORTED_LATE = {"ray.train": "ray.tune", "torch": "torch._dynamo"}  # by running workers that use the key
_IDLE_S = 10.0
_REQUEST_TIMEOUT_S = 5.0
_OUTLIVING = ("ray::_Autoscali", "ray::PlacementG")  # the names, cut by /proc, of Ray's actors that may outlive a job


@dataclass(frozen=True)
class Request:
    """A worker to start, and everything that the worker inherits from its parent; see ``shim.request``."""

    python: str
    argv: list[str]
    environment: dict[str, str]
    folder: str
    nice: int
    oom_score_adj: str
    open_files: tuple[int, int]
    is_group_leader: bool
    blocked_signals: list[int]
    ignores_interrupt: bool
    descriptors: list[int]  # standard input, output and error


def main() -> None:
    """Import modules, then fork workers until no more requests can come."""
    atexit.register(_end_at_once)  # registered first, so called last, also in a worker
    path, modules, environment = Path(sys.argv[1]), sys.argv[2:], dict(os.environ)
    with listening(path) as listener:
        _end_with_owner()
        request = serve(listener, environment, load(modules))
    if request is not None:
        sys.argv[:] = request.argv
        sys.path[0] = str(Path(request.argv[0]).parent)
        runpy.run_path(request.argv[0], run_name="__main__")


def _end_at_once() -> None:
    """Exit before C++ destructors run: in them, Ray 2.60 may wait forever for a lock that it holds itself."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen at a path to which only this user may connect. At the end, the server removes the path; its forks do not.

    The server listens before it imports anything, so that workers can wait for it. If it was silent for too long,
    another server may have taken over the path; then leave the other server's socket alone.
    """
    server, umask = os.getpid(), os.umask(0o177)
    silent, lock = (path.with_name(path.name + end) for end in (".silent", ".lock"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.umask(umask)
        own = os.stat(path)
        listener.listen(128)
        try:
            yield listener
        finally:
            if os.getpid() == server:
                is_replaced = path.exists() and not os.path.samestat(os.stat(path), own)
                for file in [silent] if is_replaced else [path, silent, lock]:
                    file.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another server listens there
                    path.parent.rmdir()


def _end_with_owner() -> None:
    """Exit as soon as this process's owner exits, even during an import."""
    if not _owner():
        return
    signal.signal(signal.SIGIO, lambda number, frame: sys.exit())
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select(_owner(), [], [], 0)[0]:  # the owner exited before the signal was set up
        sys.exit()


def load(modules: Sequence[str]) -> str:
    """Import modules. Return why this process cannot be forked afterwards; an empty string if it can."""
    os.environ.update(_FOR_IMPORTS)
    gc.disable()  # it would take a fifth of the time
    try:
        from ray_fork import ray_internals

        with ray_internals.actor_ids_from_kernel():
            for name in modules:
                importlib.import_module(name)
            for name, later in _IMPORTED_LATE.items():
                if name in sys.modules:
                    importlib.import_module(later)
        drawn = [in_fork(ray_internals.random_id) for _ in range(2)]
        if drawn[0] == drawn[1]:
            return "two forks would draw the same ids"
        torch: Any = sys.modules.get("torch")
        if torch and (
            torch.cuda.is_initialized() or in_fork(lambda: bytes([torch.cuda._is_in_bad_fork()])) == bytes([True])
        ):
            return "an import has used CUDA"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.enable()
    gc.freeze()  # else the collector would write to all objects and so copy the memory that workers share
    num_threads = len(os.listdir("/proc/self/task"))
    return f"the fork server has {num_threads} threads" if num_threads > 1 else ""


def in_fork(action: Callable[[], bytes]) -> bytes:
    """Run an action in a fork of this process, and return its result; empty if the action fails."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, action())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        returned = pipe.read()
    os.waitpid(pid, 0)
    return returned


def serve(listener: socket.socket, environment: dict[str, str], refusal: str) -> Request | None:
    """Fork a worker for each request. In a worker, return its request; in the server, return None at the end."""
    workers: set[int] = set()
    signal.signal(signal.SIGCHLD, lambda number, frame: _reap(workers))
    while _is_wanted(listener, workers):
        connection, _ = listener.accept()
        with connection:
            request = receive(connection) if is_own(connection) else None
            if request is None:
                continue
            pid, answer = _fork(request, environment, refusal)
            if pid == 0:
                listener.close()
                try:
                    become(request)
                    connection.sendall(str(os.getpid()).encode())
                except Exception as error:
                    with contextlib.suppress(OSError):  # the client has hung up
                        connection.sendall(f"{type(error).__name__}: {error}".encode(errors="replace"))
                    os._exit(1)
                return request
            if pid is not None:
                workers.add(pid)
            for descriptor in request.descriptors:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                connection.sendall(answer.encode(errors="replace"))
    return None


def _fork(request: Request, environment: dict[str, str], refusal: str) -> tuple[int | None, str]:
    """Fork for a request. Return the fork's process id (0 in the fork), or None and why there is no fork."""
    try:
        reason = refusal or other_versions(request) or why_not(request.environment, environment)
        return (None, reason) if reason else (os.fork(), "")
    except Exception as error:  # such as a limit on processes, or a request with values of wrong types
        return None, f"{type(error).__name__}: {error}"


def _is_wanted(listener: socket.socket, workers: set[int]) -> bool:
    """Wait for a request; return False if no more can come."""
    owner = _owner()
    while True:
        ready, _, _ = select.select([listener.fileno(), *owner], [], [], None if owner else _IDLE_S)
        if ready:
            return ready == [listener.fileno()]
        if all(_name_of(pid) in ("", *_OUTLIVING) for pid in tuple(workers)):  # a copy: workers may exit meanwhile
            return False


def _owner() -> list[int]:
    """Return standard input's descriptor if it is a pipe: the owner holds the other end."""
    return [0] if stat.S_ISFIFO(os.fstat(0).st_mode) else []


def _name_of(pid: int) -> str:
    """Return a process's name; empty if the process has exited."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    return ""


def _reap(workers: set[int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            workers.discard(pid)


def receive(connection: socket.socket) -> Request | None:
    """Return a client's request; None if it is incomplete or malformed, or the client has hung up."""
    connection.settimeout(_REQUEST_TIMEOUT_S)
    descriptors: list[int] = []
    try:
        head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
        size, content = int.from_bytes(head, "big"), bytearray()
        while len(content) < size and (more := connection.recv(min(size - len(content), 2**20))):
            content += more
        request = Request(**json.loads(content), descriptors=descriptors)
        has_hung_up = select.select([connection], [], [], 0)[0]  # the client sends no more: readable means closed
        if len(descriptors) == 3 and not has_hung_up:
            return request
    except Exception:  # whatever a client sends, the server must continue
        pass
    for descriptor in descriptors:
        os.close(descriptor)
    return None


def other_versions(request: Request) -> str:
    """Return how the worker's versions differ from this server's; an empty string if they are the same.

    The worker's Ray may be in another folder than the server's, or may have been installed since the server started.
    """
    import ray

    text = Path(request.argv[0]).parents[2].joinpath("_version.py").read_text(encoding="utf-8")
    rays = text.partition('\nversion = "')[2].partition('"')[0]
    workers, own = (f"Python {request.python} and Ray {rays}", f"Python {python_version()} and Ray {ray.__version__}")
    return "" if workers == own else f"the worker has {workers}, the fork server {own}"


def why_not(workers: dict[str, str], own: dict[str, str]) -> str:
    """Return why a server with the variables ``own`` cannot fork a worker; an empty string if it can."""
    for name in sorted(workers.keys() | own.keys()):
        is_early = name == "RAY_JOB_ID" or (name.startswith(_READ_AT_IMPORT) and name not in _TAKES_EFFECT_LATER)
        if is_early and workers.get(name) != own.get(name):
            return f"{name} differs from the fork server's value"
    return ""


def become(request: Request) -> None:
    """Turn this freshly forked process into the worker that Ray would have started."""
    from ray_fork import ray_internals

    for number, descriptor in enumerate(request.descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in (signal.SIGCHLD, signal.SIGIO):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if request.ignores_interrupt else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked_signals)
    if request.is_group_leader:
        os.setpgid(0, 0)
    os.setpriority(os.PRIO_PROCESS, 0, request.nice)
    resource.setrlimit(resource.RLIMIT_NOFILE, request.open_files)
    Path("/proc/self/oom_score_adj").write_text(request.oom_score_adj, encoding="ascii")
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    # Redo what libraries did on import. Python reseeds its own generator in a fork; Ray's has no seed yet.
    numpy: Any = sys.modules.get("numpy")
    torch: Any = sys.modules.get("torch")
    if numpy:
        numpy.random.seed()
    if torch:
        torch.seed()
    ray_internals.read_settings_again()
    _end_with_raylet(int(os.environ["RAY_RAYLET_PID"]))
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if torch and threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))


def _end_with_raylet(raylet: int) -> None:
    """Exit as soon as this worker's raylet exits. Ray would watch the process that it read of when it was imported."""
    ended = select.poll()
    ended.register(os.pidfd_open(raylet), select.POLLIN)

    def wait() -> None:
        ended.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
