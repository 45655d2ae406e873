"""Evaluate a checkpoint on the test set, in Ray tasks.

python jobs/evaluate.py train_2026-01-31_12-00-00_5e1f
python jobs/evaluate.py ~/ray_results/my_run/checkpoint_epoch-002_step-000000 --num-tasks 4
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.evaluate)
