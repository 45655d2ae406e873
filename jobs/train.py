"""Train a workload on Ray, evaluate it on the test set, and write the run's files.

python jobs/train.py
python jobs/train.py --num-workers 4
python jobs/train.py --workload my_problem.py
ray job submit --working-dir . -- python jobs/train.py --num-workers 4
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.train)
