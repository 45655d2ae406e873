"""The script that a local Ray runs instead of its two agents, each of which exits with the raylet.

The raylet waits until the dashboard's agent has named its ports, and exits if there is none. Ray's own imports Ray and
the dashboard's modules, which takes longer than the rest of Ray's start: this script imports little, and opens no port.

The agent for runtime environments is Ray's own: ``agents.py SCRIPT ARGUMENT...`` becomes it. It would try for a minute
to report a killed raylet to the GCS, which has ended, too; so the kernel ends it with the raylet.
"""

import ctypes
import os
import signal
import sys
import time

_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_NO_PORT = "-1"
_LOOK_INTERVAL_S = 1.0
_PR_SET_PDEATHSIG = 1  # a constant of prctl.h


def main() -> None:
    """Become the agent that the first argument names; without one, stand in for the dashboard's agent."""
    if sys.argv[1].endswith(".py"):
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])
    raylet = os.getppid()
    options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
    for name in _PORTS:  # in files as Ray 2.60 writes them
        file = os.path.join(options["session-dir"], f"{name}_{options['node-id']}")
        with open(f"{file}.new", "w", encoding="ascii") as new:
            new.write(_NO_PORT)
        os.rename(new.name, file)
    while os.getppid() == raylet:
        time.sleep(_LOOK_INTERVAL_S)


if __name__ == "__main__":
    main()
