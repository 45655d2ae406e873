"""Forks a local Ray's workers in tenths of a second. Under ``uv run``, lets workers use uv's environment.

Without it: Ray starts each worker as a new Python, which takes seconds to import torch. Under ``uv run``, if a script
has imported Ray first, each worker makes an environment of its own.
"""

from __future__ import annotations

import os

from ray._private import ray_constants

from ray_fork.ray_internals import shim_in_local_ray as shim_in_local_ray


def read_uv_setting_again() -> None:
    """Let workers use the environment of ``uv run``, even if a script has imported Ray first."""
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV") == "1"
