"""Compare runs: what differs, their figures, and which is better on the same test set.

python jobs/compare.py RUN OTHER_RUN
python jobs/compare.py RUN OTHER_RUN THIRD_RUN --output page.html
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.compare)
