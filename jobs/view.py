"""Look at the images of a data set.

python jobs/view.py --index 10
python jobs/view.py --split test --label 3 --count 32 --output threes.png
python jobs/view.py --stats
"""

from mnist_ray import cli
from mnist_ray.config import DataConfig, ViewConfig


def main() -> None:
    """Read the flags, then show the images."""
    flags = cli.Parser("Look at the images of a data set.", ViewConfig, DataConfig).read_flags()

    from mnist_ray.tools.view import view  # imports matplotlib, after the flags are known to be right

    view(flags)


if __name__ == "__main__":
    cli.run(main)
