"""Whether somebody listens at an address."""

from __future__ import annotations

import socket

_CONNECT_TIMEOUT_S = 4.0


def listens(address: str) -> bool:
    """Tell whether a process listens at an address, HOST:PORT; it need not be Ray's."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
