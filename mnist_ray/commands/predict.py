"""Print a trained model's predictions for your own pictures."""

from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import LookupConfig, PredictionConfig
from mnist_ray.settings import build
from mnist_ray.tools import flags


def main() -> None:
    """Read the flags, then predict."""
    parser = cli.Parser("Print a trained model's predictions for your own pictures.", PredictionConfig, LookupConfig)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="pictures, or folders of them")
    flags.add_run(parser, "--run")
    given = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.run.find import find  # imports torch and Ray, after the flags are known to be right
    from mnist_ray.tools.predict import predict, takes_pictures

    storage_path = build(LookupConfig, given).storage_path
    found = find(given.get("run"), storage_path, given.get("workload"), is_wanted=takes_pictures)
    predict(given["images"], found, build(PredictionConfig, given))
