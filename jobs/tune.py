"""Search settings with Ray Tune, and evaluate the best trial once on the test set.

Without --sweep, every setting with a search space is searched: batch size, learning rate, and the workload's own.
By default, a trial has one worker with one CPU; --num-workers and --cpus-per-worker change that.

python jobs/tune.py --num-trials 16
python jobs/tune.py --num-trials 8 --num-epochs 3 --sweep learning_rate=log:1e-3:1e-1 batch_size=64,128,256
python jobs/tune.py --workload my_problem.py
python jobs/tune.py --resume --run-name NAME
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.tune)
