"""Done once: from a Kaggle account or a tree of images to a verified index.

NumPy only: nothing in this room imports torch, and it knows nothing of loaders or training.
"""
