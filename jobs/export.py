"""Write a trained model as a program of torch.export.

python jobs/export.py
python jobs/export.py my_run --output digits.pt2
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.export)
