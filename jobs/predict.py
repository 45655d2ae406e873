"""Let a trained model answer your own pictures of digits.

python jobs/predict.py photo.jpg scans/
python jobs/predict.py scans/ --run my_run --grid seen.png
python jobs/predict.py scans/ --json
"""

from mnist_ray import cli, environment
from mnist_ray.config import LookupConfig, PredictionConfig


def main() -> None:
    """Read the flags, then answer."""
    parser = cli.Parser("Let a trained model answer your own pictures of digits.", PredictionConfig, LookupConfig)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="pictures, or folders of them")
    parser.add_argument(
        "--run",
        metavar="CHECKPOINT_OR_RUN",
        default=cli.UNSET,
        help="a checkpoint's or a run's folder or URI, or a run's name; default: the newest run",
    )
    flags = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.tools.prediction import predict  # imports torch and Ray, after the flags are known to be right

    predict(flags)


if __name__ == "__main__":
    cli.run(main)
