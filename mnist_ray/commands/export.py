"""Write a trained model as a program of torch.export or ONNX."""

from mnist_ray import cli
from mnist_ray.cluster import environment
from mnist_ray.config import ExportConfig, LookupConfig
from mnist_ray.settings import build
from mnist_ray.tools import flags


def main() -> None:
    """Read the flags, then write the model."""
    parser = cli.Parser("Write a trained model as a program of torch.export or ONNX.", ExportConfig, LookupConfig)
    flags.add_run(parser, "run")
    given = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.run.find import find  # imports torch, after the flags are known to be right
    from mnist_ray.tools.export import export

    found = find(given["run"], build(LookupConfig, given).storage_path, given.get("workload"))
    export(found, build(ExportConfig, given))
