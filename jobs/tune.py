"""Search settings with Ray Tune, and evaluate the best trial once on the test set.

python jobs/tune.py --num-trials 16
python jobs/tune.py --num-trials 8 --num-epochs 3 --sweep learning_rate=log:1e-3:1e-1 batch_size=64,128,256
python jobs/tune.py --workload my_problem.py
python jobs/tune.py --resume --run-name NAME
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.tune)
