"""The script that a local Ray runs instead of its dashboard agent: it opens no ports, and exits with the raylet.

The raylet waits until the agent has named its ports, and exits if there is no agent. Ray's own agent imports Ray and
the dashboard's modules; this takes longer than the rest of Ray's start. So this script imports little.
"""

import os
import sys
import time

_NAMES = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_NO_PORT = "-1"
_LOOK_INTERVAL_S = 1.0


def main() -> None:
    """Tell the raylet that there are no ports, in files as Ray 2.60 writes them; then wait until it exits."""
    raylet = os.getppid()
    options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
    for name in _NAMES:
        file = os.path.join(options["session-dir"], f"{name}_{options['node-id']}")
        with open(f"{file}.new", "w", encoding="ascii") as new:
            new.write(_NO_PORT)
        os.rename(new.name, file)
    while os.getppid() == raylet:
        time.sleep(_LOOK_INTERVAL_S)


if __name__ == "__main__":
    main()
