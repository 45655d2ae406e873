"""One training run on Ray."""
