"""Checkpoints: tensors as safetensors, the rest as JSON and as values that run no code."""
