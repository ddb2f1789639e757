"""Architectures by name. Knows nothing of data or training."""
