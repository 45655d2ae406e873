"""Checks whether anything listens at an address."""

from __future__ import annotations

import socket

_CONNECT_TIMEOUT_S = 4.0


def listens(address: str) -> bool:
    """Return whether any process, of Ray or not, listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
