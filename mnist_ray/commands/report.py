"""Make a run's report again, or compare several runs."""

from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import LookupConfig
from mnist_ray.errors import UsageError
from mnist_ray.settings import build
from mnist_ray.storage import find_run
from mnist_ray.tools import flags


def main() -> None:
    """Read the flags, then write the page."""
    parser = cli.Parser("Make a run's report again, or compare several runs.", LookupConfig)
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="a run's folder, URI or name, also a sweep's; default: the newest run"
    )
    parser.add_argument("--output", default=cli.UNSET, help="the page of several runs (default: comparison.html)")
    flags.add_workload(parser)
    given = parser.read_flags()
    environment.prepare(verbose=False)
    storage_path, reference = build(LookupConfig, given).storage_path, given.get("workload")
    runs = [find_run(run, storage_path) for run in given["runs"] or [None]]

    from mnist_ray.tools import pages  # imports matplotlib, after the flags are known to be right

    if len(runs) > 1:
        pages.compare(runs, reference, storage_path, given.get("output", "comparison.html"))
    elif "output" in given:
        raise UsageError("--output is for the page of several runs; that of one is in the run's folder")
    else:
        pages.write_again(runs[0], reference, storage_path)
