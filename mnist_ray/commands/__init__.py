"""The story of each command: what ``jobs/`` and ``mnist-ray`` run."""
