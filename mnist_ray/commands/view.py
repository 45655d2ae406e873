"""Look at the examples of a workload's data."""

from mnist_ray import cli
from mnist_ray.config import ViewConfig
from mnist_ray.settings import build
from mnist_ray.tools import flags
from mnist_ray.workload import source


def main() -> None:
    """Read the flags, then show the examples."""
    workload_class = source.load(cli.peek("workload").get("workload", source.DEFAULT))
    parser = cli.Parser("Look at the examples of a workload's data.", ViewConfig, workload_class.Settings)
    flags.add_workload(parser, default="MNIST")
    given = parser.read_flags()

    from mnist_ray.tools.view import view

    view(workload_class(build(workload_class.Settings, given)), build(ViewConfig, given))
