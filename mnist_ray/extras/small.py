"""A local Ray with only what one job needs; it starts in a second, and other machines cannot reach it.

Without it: Ray also starts an autoscaler, a log monitor, and the dashboard's process and agent. A signal to all
processes of the job reaches Ray's processes too, so Ray may exit before a checkpoint is saved. If a script imports Ray
before the job has set Ray's variables, the local Ray listens on all interfaces.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray._private import ray_constants, services, utils
from ray._private.node import Node
from ray._private.parameter import RayParams

from mnist_ray.extras import replaced
from mnist_ray.ray_versions import must_ask_for_tokens
from ray_fork.ray_internals import read_settings_again

_SETTINGS = {
    # Keep an evaluation's process for the next evaluation; Ray would end it after a second. Starts are expensive.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
    # Workers inherit the niceness of the command that starts them. With Ray's 15, all other programs would go first.
    "RAY_worker_niceness": "0",
    # Start no processes in advance: a job's processes have an environment of their own.
    "RAY_prestart_worker_first_driver": "0",
}
_END_TIMEOUT_S = 5.0  # for one of Ray's processes, if the start fails
_AGENTS = str(Path(__file__).with_name("agents.py"))
_OF_DASHBOARD = os.path.join(services.RAY_PATH, "dashboard", "agent.py")
_OF_ENVIRONMENTS = os.path.join(services.RAY_PATH, "_private", "runtime_env", "agent", "main.py")


@contextlib.contextmanager
def for_one_job(*, log_to_driver: bool) -> Iterator[None]:
    """Let a Ray that is started inside the block leave out what only a cluster needs.

    This is the autoscaler, the log monitor if no log is shown, and the dashboard's process and agent, which Ray would
    start and wait for even without a dashboard. Ray's processes get sessions of their own: a signal to all processes of
    the job does not reach them, so the job can still save a checkpoint. On Linux, the kernel ends them with the job. If
    the block fails or is interrupted, end them: Ray itself would leave them running until this process exits.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if must_ask_for_tokens():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        read_settings_again()
    started: list[services.ConsolePopen] = []
    popen = services.ConsolePopen

    def in_own_session(command: list[str], **options: Any) -> Any:
        words = [_with_own_agents(word) for word in command]
        started.append(popen(words, start_new_session=sys.platform.startswith("linux"), **options))
        return started[-1]

    parameters = functools.partialmethod(RayParams.__init__, no_monitor=True, include_log_monitor=log_to_driver)
    with (
        replaced(services, "ConsolePopen", in_own_session),
        replaced(RayParams, "__init__", parameters),
        replaced(Node, "start_api_server", lambda node, **options: None),
        replaced(utils, "get_dashboard_dependency_error", lambda: None),  # it imports the dashboard's packages
        replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),  # as on macOS: listen on loopback only
    ):
        try:
            yield
        except BaseException as error:
            names = [os.path.basename(process.args[0]) for process in started if process.poll() is not None]
            for process in reversed(started):  # the raylet, which stops its agents, before the GCS
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_TIMEOUT_S)
                process.kill()
            if names and isinstance(error, Exception):  # its cause; Ray itself waits, then names a file or a timeout
                raise RuntimeError(f"its {names[0]} has died") from error
            raise


def _with_own_agents(word: str) -> str:
    """Return a word of the raylet's command, whose options hold the commands of its agents."""
    of_dashboard, of_environments = (subprocess.list2cmdline([path]) for path in (_OF_DASHBOARD, _OF_ENVIRONMENTS))
    own = subprocess.list2cmdline([_AGENTS])
    return word.replace(of_dashboard, own).replace(of_environments, f"{own} {of_environments}")
