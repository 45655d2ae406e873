"""Compare two runs: what differs, their figures, and which is better on the same test set.

python jobs/compare.py RUN OTHER_RUN
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.compare)
