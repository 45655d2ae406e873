"""Forks Ray's worker processes, in tenths of a second, from a process that has already imported everything.

The package does not know what the workers do. A driver calls ``starting``; Ray runs ``shim`` instead of a worker's
Python; ``server`` imports once, then forks. If a worker cannot be forked safely, Ray starts it as usual.
"""
