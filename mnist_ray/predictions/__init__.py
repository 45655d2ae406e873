"""Predictions of a trained model: for a few inputs, and for data at scale."""
