"""A distributed ImageNet training pipeline whose runs are a pure function of (recipe, index, seed, step)."""

__version__ = "0.1.0"
