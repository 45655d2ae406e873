"""Print a trained model's predictions for your own images.

python jobs/predict.py digit.png scans/
python jobs/predict.py scans/ --run my_run --grid seen.png
python jobs/predict.py scans/ --json
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.predict)
