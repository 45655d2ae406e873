"""A local Ray with only what one job needs; it starts in a second.

Without it: Ray also starts an autoscaler, a log monitor, and the dashboard's process and agent. A signal to all
processes of the job reaches Ray's processes too, so Ray may exit before a checkpoint is saved.
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

import ray
from ray._private import services, utils
from ray._private.node import Node
from ray._private.parameter import RayParams

from mnist_ray.extras import replaced

_SETTINGS = {
    # Keep an evaluation's process for the next evaluation; Ray would end it after a second. Starts are expensive.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
    # Workers inherit the niceness of the command that starts them. With Ray's 15, all other programs would go first.
    "RAY_worker_niceness": "0",
    # Start no processes in advance: a job's processes have an environment of their own.
    "RAY_prestart_worker_first_driver": "0",
}
_END_TIMEOUT_S = 5.0  # for one of Ray's processes
_started: list[services.ConsolePopen] = []  # Ray's processes
_AGENT = os.path.join(services.RAY_PATH, "dashboard", "agent.py")
_NO_DASHBOARD = str(Path(__file__).with_name("no_dashboard.py"))
_OTHER_AGENT = os.path.join(services.RAY_PATH, "_private", "runtime_env", "agent", "main.py")
_UNTIL_RAYLET = str(Path(__file__).with_name("until_raylet.py"))


def wait_until_ended() -> None:
    """Wait until the processes of a Ray that is shut down have exited.

    The raylet first stops its agents. If this process exited before, the kernel would kill the raylet, and an agent
    would run for another minute. A Ray that does not answer is not shut down, and not waited for.
    """
    if ray.is_initialized():
        return
    for process in _started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)
    _started.clear()


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
    started = _started
    started.clear()
    with_parameters = functools.partialmethod(RayParams.__init__, no_monitor=True, include_log_monitor=log_to_driver)
    is_linux = sys.platform.startswith("linux")
    popen = services.ConsolePopen
    agent, no_agent = (subprocess.list2cmdline([path]) for path in (_AGENT, _NO_DASHBOARD))
    other_agent, until_raylet = map(subprocess.list2cmdline, ([_OTHER_AGENT], [_UNTIL_RAYLET, _OTHER_AGENT]))

    def in_own_session(command: list[str], **options: Any) -> Any:
        # The agents' commands are in options of the raylet.
        words = [word.replace(agent, no_agent).replace(other_agent, until_raylet) for word in command]
        started.append(popen(words, start_new_session=is_linux, **options))
        return started[-1]

    with (
        replaced(services, "ConsolePopen", in_own_session),
        replaced(RayParams, "__init__", with_parameters),
        replaced(Node, "start_api_server", lambda node, **options: None),
        replaced(utils, "get_dashboard_dependency_error", lambda: None),  # it imports the dashboard's packages
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
