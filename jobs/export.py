"""Write a trained model as a program of torch.export or ONNX.

python jobs/export.py
python jobs/export.py my_run --format onnx --output digits.onnx
"""

from mnist_ray import cli, environment
from mnist_ray.config import ExportConfig, LookupConfig


def main() -> None:
    """Read the flags, then write the model."""
    parser = cli.Parser("Write a trained model as a program of torch.export or ONNX.", ExportConfig, LookupConfig)
    parser.add_argument(
        "run",
        metavar="CHECKPOINT_OR_RUN",
        nargs="?",
        help="a checkpoint's or a run's folder or URI, or a run's name; default: the newest run",
    )
    flags = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.tools.export import export  # imports torch, after the flags are known to be right

    export(flags)


if __name__ == "__main__":
    cli.run(main)
