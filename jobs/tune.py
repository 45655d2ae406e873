"""Search batch size and learning rate with Ray Tune, train the best and evaluate it once on the test set.

A trial has one worker with one CPU unless --num-workers and --cpus-per-worker say otherwise; one that fails is tried
once more.

python jobs/tune.py --num-trials 16
python jobs/tune.py --search optuna --num-epochs 3 --batch-sizes 64 128 256
python jobs/tune.py --resume --run-name NAME
"""

from mnist_ray import cli, environment
from mnist_ray.config import DataConfig, OutputConfig, SweepConfig, TrainConfig, WorkerConfig


def main() -> None:
    """Read the flags, then run the sweep."""
    parser = cli.Parser(
        "Search batch size and learning rate with Ray Tune. A trial has one worker with one CPU, unless --num-workers "
        "and --cpus-per-worker say otherwise.",
        SweepConfig,
        TrainConfig,
        DataConfig,
        WorkerConfig,
        OutputConfig,
        without=("batch_size", "learning_rate"),
    )
    flags = parser.read_flags()
    environment.prepare(verbose="verbose" in flags)

    from mnist_ray.sweeps.tuning import tune_and_train  # imports torch and Ray, after the flags are known to be right

    tune_and_train(flags)


if __name__ == "__main__":
    cli.run(main)
