"""Evaluate a checkpoint on a test set, as Ray tasks.

python jobs/evaluate.py train_2026-01-31_12-00-00_5e1f
python jobs/evaluate.py ~/ray_results/my_run/checkpoint_epoch-002_step-000000 --num-tasks 4
"""

from mnist_ray import cli, environment
from mnist_ray.config import DataConfig, EvaluationConfig, LookupConfig


def main() -> None:
    """Read the flags, then evaluate."""
    parser = cli.Parser("Evaluate a checkpoint on a test set.", DataConfig, EvaluationConfig, LookupConfig)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        nargs="?",
        help="a checkpoint's or a run's folder or URI, or a run's name; default: the newest run",
    )
    flags = parser.read_flags()
    environment.prepare(verbose=False)

    from mnist_ray.runs.run import evaluate_checkpoint  # imports torch and Ray, after the flags are known to be right

    evaluate_checkpoint(flags)


if __name__ == "__main__":
    cli.run(main)
