"""Train a run again from its files, and compare the weights to the bit.

python jobs/reproduce.py RUN
python jobs/reproduce.py RUN --dry-run
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.reproduce)
