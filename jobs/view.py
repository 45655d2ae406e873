"""Show examples of a workload's data.

python jobs/view.py --index 10
python jobs/view.py --split test --count 32 --output digits.png
python jobs/view.py --workload my_problem.py
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.view)
