"""Tells whether the caller's own code uses the local Ray that a call from Python has kept for the next call.

Without it: no Ray is kept, and each call starts its own.
"""

from __future__ import annotations

from ray._private import ray_constants
from ray._private.worker import global_worker


def uses_of_ray() -> set[bytes]:
    """Return ids of what this process has made in Ray: exported functions and classes, and references that it holds."""
    exported = global_worker.gcs_client.internal_kv_keys(b"", ray_constants.KV_NAMESPACE_FUNCTION_TABLE)
    return {*exported, *global_worker.core_worker.get_all_reference_counts()}
