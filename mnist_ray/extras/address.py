"""Finds this user's ``ray start`` on this machine, and checks a cluster's address before Ray connects to it.

Without it: a cluster is joined only if RAY_ADDRESS names it. If another service listens there, Ray tries for minutes.
Ray sends a token only with RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys

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
from mnist_ray.network import listens
from ray_fork.ray_internals import read_settings_again

_ANSWER_TIMEOUT_S = 4.0
_MAX_ADDRESS = 300  # bytes


def find(named: str) -> tuple[str | None, list[str]]:
    """Return the address of the cluster to join, or None to start a local Ray, and notes for the user.

    ``named``: HOST:PORT or "auto". ``ray.init(address="auto")`` would even join the local Ray of another job on this
    machine, and wait for minutes for a cluster that is gone. Raises JobError if a named cluster cannot be joined.
    """
    if named == "auto":
        try:
            started_here = address_of_ray_start()
        except OSError as error:
            reason = f"{error.filename} is ignored ({error.strerror})"
            return None, [f"{reason}: not joining a cluster; to join one, set RAY_ADDRESS=HOST:PORT"]
        if not (started_here and listens(started_here) and _answers(started_here)):
            return None, []
        try:
            check_version_info(get_cluster_metadata(GcsClient(address=started_here)), "this machine")
        except RuntimeError as error:
            return None, [f"not joining the cluster at {started_here}: {' '.join(str(error).split())}"]
        return started_here, []
    if not listens(named) or not _answers(named):
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start a local Ray")
    if os.geteuid() not in {0, *(owners_here(named) or {os.geteuid()})}:  # Ray's C++ would abort
        belongs = "belongs to another user, whose files you cannot write"
        raise JobError(f"the node of RAY_ADDRESS={named} on this machine {belongs}; use ray job submit")
    return named, []


def _answers(address: str) -> bool:
    """Return whether Ray, not another service, answers at an address. Raises JobError if Ray rejects the token."""
    try:
        _ask(address, _ANSWER_TIMEOUT_S)
    except ray.exceptions.AuthenticationError as error:
        advice = "copy the head's ~/.ray/auth_token here, set RAY_AUTH_TOKEN to its content, or RAY_ADDRESS=local"
        raise JobError(f"the Ray cluster at {address} requires the head's token; {advice}") from error
    except ray.exceptions.RayError:
        return False
    return True


def address_of_ray_start() -> str | None:
    """Return the address of this user's ``ray start`` on this machine; None if none is running.

    "auto" would also join the local Ray of another job, or any address that another user has written to the shared
    folder: this process would send its token there, and run the code that it receives. Raises OSError if another user
    may have written the file.
    """
    file = get_ray_address_file(None)
    if not os.path.lexists(file):
        return None
    with open(file, "rb", opener=_without_detours) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", file)
        if {found.st_uid, os.stat(os.path.dirname(file)).st_uid} - {0, os.geteuid()}:
            raise OSError(errno.EPERM, "another user may have written it", file)
        address = stream.read(_MAX_ADDRESS).decode(errors="replace").strip()
    return address if os.geteuid() in owners_here(address) and _has_own_gcs(address) else None


def _without_detours(path: str, flags: int) -> int:
    """Open a file without following a link or waiting for the writer of a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def owners_here(address: str) -> set[int]:
    """Return the ids of the users who run a node of a cluster on this machine."""
    running = (process.info for process in psutil.process_iter(["name", "uids", "cmdline"]))
    raylets = [info for info in running if info["name"] == "raylet"]
    return {info["uids"].effective for info in raylets if f"--gcs-address={address}" in (info["cmdline"] or ())}


def _has_own_gcs(address: str) -> bool:
    """Return whether a GCS is on another machine, or is a process of this user that listens at the address."""
    host, _, port = address.rpartition(":")
    if not any(host == own.address for of_card in psutil.net_if_addrs().values() for own in of_card):
        return True
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):  # another user's process, or it has exited
            if process.info["name"] == "gcs_server" and process.uids().effective == os.geteuid():
                connections = process.net_connections("tcp")
                if any(own.status == psutil.CONN_LISTEN and str(own.laddr.port) == port for own in connections):
                    return True
    return False


def _ask(address: str, timeout_s: float) -> None:
    """Raise a RayError if no Ray answers at an address within ``timeout_s``; ``ray.init`` would try for minutes.

    Afterwards, this process sends its token if the cluster requires one; otherwise the job's actors would die.
    """
    os.environ.pop(AUTH_MODE_ENV_VAR, None)
    read_settings_again()
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # Ray's C++ would print each of its three attempts
    try:
        InnerGcsClient.standalone(address, None, int(timeout_s * 1000))
    except ray.exceptions.AuthenticationError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        InnerGcsClient.standalone(address, None, int(timeout_s * 1000))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
