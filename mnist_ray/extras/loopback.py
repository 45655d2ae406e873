"""A local Ray listens on loopback only and requires its token, even if a script has imported Ray first.

Without it: these variables must be set before Ray is imported; otherwise a note reports what is open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ray._private import ray_constants

from mnist_ray.extras import replaced
from mnist_ray.ray_versions import must_ask_for_tokens
from ray_fork.ray_internals import read_settings_again


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside the block listen on loopback only, as on macOS, and require a token."""
    if must_ask_for_tokens():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        read_settings_again()
    with replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield
