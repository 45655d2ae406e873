"""What one does with data and finished runs."""
