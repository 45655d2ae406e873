"""MNIST with the notebook's network."""
