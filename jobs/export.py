"""Write a trained model as a program of torch.export or ONNX.

python jobs/export.py
python jobs/export.py my_run --format onnx --output digits.onnx
"""

from mnist_ray import cli

if __name__ == "__main__":
    cli.run(cli.export)
