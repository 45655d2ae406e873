"""``python -m mnist_ray COMMAND`` is ``mnist-ray COMMAND``."""

from mnist_ray.cli import program

if __name__ == "__main__":
    program()
