"""Tools for data and finished runs."""
