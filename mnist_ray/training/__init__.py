"""Training and evaluation in plain PyTorch: nothing here depends on Ray."""
