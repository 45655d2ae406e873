"""Rewrite the report of a run or a sweep.

python jobs/report.py RUN
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.report)
