"""Shows whether the caller's own code uses the local Ray that was kept after a call from Python.

Without it: no Ray is kept, and each call starts its own.
"""

from __future__ import annotations

from ray._private import ray_constants
from ray._private.worker import global_worker


def uses_of_ray() -> set[bytes]:
    """Return ids of what this process made in Ray: functions and classes it exported, and references it holds."""
    exported = global_worker.gcs_client.internal_kv_keys(b"", ray_constants.KV_NAMESPACE_FUNCTION_TABLE)
    return {*exported, *global_worker.core_worker.get_all_reference_counts()}
