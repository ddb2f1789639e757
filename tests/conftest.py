"""Data that many tests share: made once a session, never changed by a test (copy it first)."""

from pathlib import Path

import pytest

from pipeline.dataset.synthetic import Settings, generate_tree

SYNTHETIC = Settings(classes=4, train_per_class=24, val_per_class=6, size=96, oddities=10)


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory) -> Path:
    """An ILSVRC tree as Kaggle's archive unpacks: 4 classes x (24 train + 6 val), about 96 x 80 px, 10 odd ones."""
    root = tmp_path_factory.mktemp("synthetic") / "imagenet"
    generate_tree(root, SYNTHETIC)
    return root
