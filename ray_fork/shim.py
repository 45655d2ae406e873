"""The script that Ray runs instead of a worker's Python: it asks the fork server to fork the worker, and exits.

Ray runs the script for every worker, so it imports little, and nothing from this package. If the worker cannot be
forked, the script prints the reason to the raylet's log, and becomes the process that Ray would have started.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

SOCKET_VARIABLE = "RAY_FORK_SERVER"  # the socket of the server that a job has started for its own local Ray
MODULES_VARIABLE = "RAY_FORK_MODULES"  # on a cluster: modules for a node's server, separated by spaces

_SILENT = ".silent"  # the suffix of the socket of a server that does not answer
_CONTEXT_FLAG, _LANGUAGE_FLAG = "--serialized-runtime-env-context=", "--language="  # for Ray's setup_worker.py
_MAX_TMPDIR = 18  # bytes: a socket's path may have 107; a local Ray in the user's own folder takes 89
TIMEOUT_S = 30.0  # the server may still be importing; Ray waits 60 s for a worker


def main() -> None:
    """Ask the server to fork the worker that the arguments describe; if that fails, become the worker."""
    asked = sys.argv[1:]
    command = [word for word in asked if not word.startswith((_CONTEXT_FLAG, _LANGUAGE_FLAG))]
    refusal = fork(asked, command)
    if refusal:
        with contextlib.suppress(OSError):  # such as a full disk
            print(f"a worker is started as usual, not forked: {refusal}", file=sys.stderr, flush=True)
        setup = [os.path.join(os.path.dirname(command[0]), "setup_worker.py")] if command != asked else []
        os.execv(sys.executable, [sys.executable, *setup, *asked])


def fork(asked: list[str], command: list[str]) -> str:
    """Have a worker forked. Return why this failed; an empty string on success."""
    address = ""
    try:
        variables = variables_of(asked)
        if variables is None:
            return "its runtime environment contains more than environment variables"
        environment = {**os.environ, **variables}
        address = environment.get(SOCKET_VARIABLE, "")
        if MODULES_VARIABLE in environment:
            address = node_address()
            start_server(address, environment)
        return ask(address, command, environment)
    except KeyError as error:
        return f"Ray did not pass {error}"
    except TimeoutError:
        with contextlib.suppress(OSError):  # another worker has renamed it
            os.rename(address, address + _SILENT)  # so that no other worker waits for it
        return f"the fork server has not answered for {TIMEOUT_S:.0f} s"
    except OSError as error:
        return f"the fork server does not answer: {error}"
    except Exception as error:  # whatever the reason, the worker must start
        return f"{type(error).__name__}: {error}"


def variables_of(command: list[str]) -> dict[str, str] | None:
    """Return the variables of a worker's runtime environment; None if the environment contains anything else."""
    contexts = [json.loads(word.removeprefix(_CONTEXT_FLAG)) for word in command if word.startswith(_CONTEXT_FLAG)]
    variables: dict[str, str] = {}
    for context in contexts:
        variables |= context.pop("env_vars")
        is_other_python = context.pop("py_executable") != sys.executable
        if is_other_python or any(context.values()) or "$" in "".join(variables.values()):
            return None
    return variables


def ask(address: str, command: list[str], environment: dict[str, str]) -> str:
    """Ask the server at an address to fork a worker. Return why it did not; an empty string if it did.

    Raises OSError if there is no server, or if it is another user's: the request contains the environment's secrets.
    """
    content = json.dumps(request(command, environment)).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(address)
        if not is_own(connection):
            raise PermissionError(f"{address} belongs to another user")
        socket.send_fds(connection, [len(content).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(content)
        answer = connection.recv(1000).decode(errors="replace")
    return "" if answer.isdigit() else answer or "the fork server, or the process that it forked, has exited"


def request(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return everything that a worker inherits from this process, except file descriptors."""
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        oom_score_adj = file.read()
    return {
        "python": python_version(),
        "argv": command,
        "environment": environment,
        "folder": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": oom_score_adj,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "is_group_leader": os.getpgid(0) == os.getpid(),
        "ignores_interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


def python_version() -> str:
    """Return the implementation and version of this process's Python, such as cpython 3.13.1t."""
    return f"{sys.implementation.name} {sys.version.split()[0]}{sys.abiflags}"


def is_own(connection: socket.socket) -> bool:
    """Return whether the process at the other end of a connection is this user's, in this container."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return pid > 0 and user == os.geteuid()  # 0: this process cannot see the other one


def temporary_folder() -> str:
    """Return TMPDIR, or /tmp if TMPDIR is too long for the paths of sockets, or relative: workers start elsewhere."""
    folder = os.environ.get("TMPDIR", "")
    return folder if os.path.isabs(folder) and len(os.fsencode(folder)) <= _MAX_TMPDIR else "/tmp"


def own_folder(prefix: str) -> str:
    """Return PREFIX-UID, a folder that only this user can create and change; everybody may write to Ray's own.

    Raises PermissionError if another user created it or may enter it.
    """
    folder = os.path.join(temporary_folder(), f"{prefix}-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone: remove it, or set TMPDIR to another folder")
    return folder


def node_address() -> str:
    """Return the address of a job's server on this node."""
    return os.path.join(own_folder("ray_fork"), f"fork-{os.environ['RAY_JOB_ID']}-{os.environ['RAY_RAYLET_PID']}")


def start_server(address: str, environment: dict[str, str]) -> None:
    """Start a server unless one is listening. If several workers start at once, only one of them starts it.

    Raises OSError if the server does not start.
    """
    if _answers(address):
        return
    with open(os.open(f"{address}.lock", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _answers(address):
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)  # left behind by a killed server
        server = launch(address, environment[MODULES_VARIABLE].split(), environment, subprocess.DEVNULL)
        end = time.monotonic() + TIMEOUT_S
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > end:
                raise ConnectionError("it did not start")
            time.sleep(0.01)


def launch(address: str, modules: Sequence[str], environment: dict[str, str], stdin: int) -> subprocess.Popen[bytes]:
    """Start a server; it listens before it imports the modules."""
    return subprocess.Popen(
        [sys.executable, "-m", "ray_fork.server", address, *modules],
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),  # has this package even if it is not installed
        env=environment,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # must survive a signal to the whole job: workers then save
    )


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(address) == 0


if __name__ == "__main__":
    main()
