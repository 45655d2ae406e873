"""Train the digit classifier on Ray, evaluate it on the test set, and write the run's files.

python jobs/train.py
python jobs/train.py --num-workers 4
ray job submit --working-dir . -- python jobs/train.py --num-workers 4
"""

import time

from mnist_ray import cli, environment
from mnist_ray.config import RECIPES, DataConfig, OutputConfig, TrainConfig, WorkerConfig


def main() -> None:
    """Read the flags, then run the job."""
    started_at = time.perf_counter()
    parser = cli.Parser("Train the digit classifier on Ray.", TrainConfig, DataConfig, WorkerConfig, OutputConfig)
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="named hyperparameters; flags override")
    parser.add_argument("--config", metavar="FILE", default=cli.UNSET, help="settings from a run's config.json")
    flags = parser.read_flags()
    environment.prepare(verbose="verbose" in flags)

    from mnist_ray.runs.launch import train_and_evaluate  # imports Ray, after the flags are known to be right

    train_and_evaluate(flags, started_at)


if __name__ == "__main__":
    cli.run(main)
