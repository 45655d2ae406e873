"""Forks Ray's worker processes, in tenths of a second, from a process that has already imported everything.

It does not know what the workers do. A driver calls ``starting``; Ray runs ``shim`` in place of a worker's Python;
``server`` imports once and forks. Ray starts a worker as usual if it cannot be forked safely.
"""
