"""Finds this user's ``ray start`` on this machine, and checks a cluster's address before Ray connects to it.

Without it: a cluster is joined only if RAY_ADDRESS names it. If another service listens there, Ray tries for minutes.
Ray sends a token only with RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._common.utils import get_ray_address_file
from ray._private.authentication.authentication_token_setup import (
    AUTH_MODE_ENV_VAR,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.utils import check_version_info
from ray._raylet import GcsClient, InnerGcsClient  # type: ignore[attr-defined]  # Cython, partly without stubs

from mnist_ray.errors import JobError
from ray_fork.ray_internals import read_settings_again

_ANSWER_TIMEOUT_S = 4.0
_MAX_ADDRESS = 300  # bytes


def find_ray_start(note: Callable[[str], object]) -> str | None:
    """Return the address of this user's ``ray start`` on this machine; None if there is none to join.

    ``ray.init(address="auto")`` would even join the local Ray of another job on this machine, and wait for minutes for
    a cluster that is gone. Prints a note if the cluster has other versions. Raises JobError if it rejects the token.
    """
    address = address_of_ray_start()
    if address is None or not answers(address):
        return None
    try:
        check_version_info(get_cluster_metadata(GcsClient(address=address)), "this machine")
    except RuntimeError as error:
        note(f"not joining the cluster at {address}: {' '.join(str(error).split())}")
        return None
    return address


def answers(address: str) -> bool:
    """Return whether Ray, not another service, answers at an address. Raises JobError if Ray rejects the token."""
    try:
        _ask(address)
    except ray.exceptions.AuthenticationError as error:
        advice = "copy the head's ~/.ray/auth_token here, set RAY_AUTH_TOKEN to its content, or RAY_ADDRESS=local"
        raise JobError(f"the Ray cluster at {address} requires the head's token; {advice}") from error
    except ray.exceptions.RayError:
        return False
    return True


def address_of_ray_start() -> str | None:
    """Return the address that ``ray start`` has noted in a file, if a raylet of this user is part of that cluster.

    Every user may write to the file's folder. This process would send its token to another user's address, and run the
    code that it receives.
    """
    file = Path(get_ray_address_file(None))
    with contextlib.suppress(OSError):
        if file.is_file():  # to open a FIFO would wait
            with file.open("rb") as stream:
                address = stream.read(_MAX_ADDRESS).decode(errors="replace").strip()
            return address if _has_own_raylet(address) else None
    return None


def _has_own_raylet(address: str) -> bool:
    running = (process.info for process in psutil.process_iter(["name", "uids", "cmdline"]))
    own = [info for info in running if info["name"] == "raylet" and info["uids"].effective == os.geteuid()]
    return any(f"--gcs-address={address}" in (info["cmdline"] or ()) for info in own)


def _ask(address: str) -> None:
    """Raise a RayError if no Ray answers at an address within seconds; ``ray.init`` would try for minutes.

    Afterwards, this process sends its token if the cluster requires one; otherwise the job's actors would die.
    """
    timeout_ms = int(_ANSWER_TIMEOUT_S * 1000)
    os.environ.pop(AUTH_MODE_ENV_VAR, None)
    read_settings_again()
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # Ray's C++ would print each of its three attempts
    try:
        InnerGcsClient.standalone(address, None, timeout_ms)
    except ray.exceptions.AuthenticationError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        InnerGcsClient.standalone(address, None, timeout_ms)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
