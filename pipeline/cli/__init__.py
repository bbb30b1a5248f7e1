"""What `python -m pipeline` does."""
