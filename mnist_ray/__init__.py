"""A distributed batch training job on Ray: train, tune and evaluate an image classifier."""

__version__ = "0.1.0"
