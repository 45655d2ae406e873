"""The script that starts a local Ray's agent for runtime environments, so that the kernel ends it with the raylet.

Ray's agent notices the raylet's end itself, but then tries for a minute to report it to the GCS, which has ended, too.

python until_raylet.py SCRIPT ARGUMENT...
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # a constant of prctl.h


def main() -> None:
    """Become the agent."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])


if __name__ == "__main__":
    main()
