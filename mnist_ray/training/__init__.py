"""Training and evaluation in plain PyTorch: nothing here knows of Ray."""
