"""Data that many tests share: made once a session, never changed by a test (copy it first)."""

import contextlib
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.archive import write_kaggle_zip
from pipeline.dataset.synthetic.generate import Settings, generate_tree

os.environ["OMP_NUM_THREADS"] = "1"  # of each run on a CPU, in a process of its own or not: sums depend on the number

MEDIUM, LONG = (
    set(Path(__file__).with_name(f"{name}.txt").read_text().splitlines()[1:]) for name in ("medium", "long")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The markers `medium` and `long` for the tests listed in medium.txt and long.txt."""
    for item in items:
        name = f"tests/{item.path.name}::{item.nodeid.partition('::')[2]}"
        if name.partition("[")[0] in MEDIUM:
            item.add_marker(pytest.mark.medium)
        if name in LONG:
            item.add_marker(pytest.mark.long)


def pytest_sessionfinish() -> None:
    """W&B's exit handler would end in a traceback where a test has killed the process that it speaks to."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[object]:
    """The folders that a fixture of a module or class made are removed with it, unless a test that could use them
    failed: pytest keeps them to the end of the session, some 4 GB in all."""
    if fixturedef.scope not in ("module", "class"):
        return (yield)
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    made: set[Path] = set()
    failed_before = request.session.testsfailed

    def remove() -> None:
        if request.session.testsfailed == failed_before:
            for path in made:
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    fixturedef.addfinalizer(remove)  # added first, it runs after the fixture's own end
    before = set(base.iterdir())
    try:
        return (yield)
    finally:
        made.update(set(base.iterdir()) - before)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same numbers in every run, alone or after others."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


SYNTHETIC = Settings(classes=4, train_per_class=24, val_per_class=6, size=96, oddities=10)


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory) -> Path:
    """An ILSVRC tree as Kaggle's archive unpacks: 4 classes x (24 train + 6 val), about 96 x 80 px, 10 odd ones."""
    root = tmp_path_factory.mktemp("synthetic") / "imagenet"
    generate_tree(root, SYNTHETIC)
    return root


@pytest.fixture(scope="session")
def root(synthetic_root) -> Path:
    """`synthetic_root` with its index."""
    build_index(synthetic_root)
    return synthetic_root


@pytest.fixture(scope="session")
def kaggle_zip(synthetic_root, tmp_path_factory) -> Path:
    """`synthetic_root` as the zip that Kaggle serves: 120 images, some 0.4 MB, deflated."""
    path = tmp_path_factory.mktemp("archive") / "imagenet-object-localization-challenge.zip"
    write_kaggle_zip(synthetic_root, path)
    return path


@pytest.fixture(scope="session")
def kaggle_members(kaggle_zip) -> dict[str, bytes]:
    """Member name -> bytes of `kaggle_zip`."""
    with zipfile.ZipFile(kaggle_zip) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def nested_kaggle_zip(synthetic_root, tmp_path_factory) -> Path:
    """The same as the older archive has it: a zip with a tar.gz that holds the images."""
    path = tmp_path_factory.mktemp("nested") / "imagenet-object-localization-challenge.zip"
    write_kaggle_zip(synthetic_root, path, nested=True)
    return path


@pytest.fixture(scope="session")
def cluster():
    """A real Slurm cluster of three nodes, up for the whole test run."""
    import slurm_cluster

    problem = slurm_cluster.why_not()
    if problem is not None:
        pytest.skip(problem)
    with slurm_cluster.Cluster(nodes=3) as running:
        yield running
