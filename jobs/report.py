"""Make a run's report again, or compare several runs.

python jobs/report.py RUN
python jobs/report.py RUN RUN RUN --output comparison.html
"""

from mnist_ray import cli
from mnist_ray.config import LookupConfig


def main() -> None:
    """Read the flags, then write the page."""
    parser = cli.Parser("Make a run's report again, or compare several runs.", LookupConfig)
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="a run's folder, URI or name, also a sweep's; default: the newest run"
    )
    parser.add_argument("--output", default=cli.UNSET, help="the page of several runs (default: comparison.html)")
    flags = parser.read_flags()

    from mnist_ray.display.report import make_report  # imports matplotlib, after the flags are known to be right

    make_report(flags)


if __name__ == "__main__":
    cli.run(main)
