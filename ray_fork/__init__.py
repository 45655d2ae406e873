"""Starts Ray's worker processes by fork, in tenths of a second, from a process that has imported everything.

It knows nothing of what the workers do. ``starting`` is what a driver calls, ``shim`` is what Ray runs in place of a
worker's Python, and ``server`` imports once and forks. Whatever it cannot fork safely, Ray starts as usual.
"""
