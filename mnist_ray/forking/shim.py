"""What Ray starts in place of a worker's Python: it has the worker forked by the fork server, and is gone.

Ray runs it as a script, once for each worker, so it imports little and nothing of this package. A worker that is not
forked becomes what Ray would have started; why is told in the raylet's log.
"""

from __future__ import annotations

import array
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

SOCKET_VARIABLE = "MNIST_RAY_FORK_SERVER"
"""Names the Unix socket of the server."""

_CONTEXT_FLAG, _LANGUAGE_FLAG = "--serialized-runtime-env-context=", "--language="  # for Ray's setup_worker.py
_TIMEOUT_S = 30.0  # the server may still be importing; Ray waits for a worker for 60 s


def main() -> None:
    """Have the worker forked that the arguments describe, or become it."""
    asked = sys.argv[1:]
    command = [word for word in asked if not word.startswith((_CONTEXT_FLAG, _LANGUAGE_FLAG))]
    variables = variables_of(asked)
    if variables is None:
        refusal = "its runtime environment holds more than variables"
    else:
        refusal = ask(os.environ.get(SOCKET_VARIABLE, ""), command, {**os.environ, **variables})
    if refusal:
        print(f"a worker is started as usual, not forked: {refusal}", file=sys.stderr, flush=True)
        setup = [os.path.join(os.path.dirname(command[0]), "setup_worker.py")] if command != asked else []
        os.execv(sys.executable, [sys.executable, *setup, *asked])


def variables_of(command: list[str]) -> dict[str, str] | None:
    """Return the variables of a worker's runtime environment; None where it is not made of plain variables alone."""
    contexts = [json.loads(word.removeprefix(_CONTEXT_FLAG)) for word in command if word.startswith(_CONTEXT_FLAG)]
    variables: dict[str, str] = {}
    for context in contexts:
        variables |= context.pop("env_vars")
        is_other_python = os.path.realpath(context.pop("py_executable")) != os.path.realpath(sys.executable)
        if is_other_python or any(context.values()) or "$" in "".join(variables.values()):
            return None
    return variables


def ask(address: str, command: list[str], environment: dict[str, str]) -> str:
    """Ask the server at an address to fork a worker that is as this process is; return why it did not, if so."""
    content = json.dumps(request(command, environment)).encode()
    descriptors = array.array("i", [0, 1, 2])
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(address)
            size = len(content).to_bytes(4, "big")
            connection.sendmsg([size], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            connection.sendall(content)
            answer = connection.recv(1000).decode()
    except OSError as error:
        return f"the fork server does not answer: {error}"
    return "" if answer.isdigit() else answer or "the fork server has gone"


def request(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return what a worker has from its parent, besides its descriptors."""
    return {
        "argv": command,
        "environment": environment,
        "folder": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": _read("/proc/self/oom_score_adj"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "is_group_leader": os.getpgid(0) == os.getpid(),
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
