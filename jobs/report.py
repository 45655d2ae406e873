"""Write a run's report again, or compare several runs.

python jobs/report.py RUN
python jobs/report.py RUN RUN RUN --output comparison.html
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.report)
