"""`fetch cifar10`: the archive of its authors as a tree of class folders, whole and verified or not at all."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.config import parse_config
from pipeline.dataset.acquire.sources import cifar10
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.dataset.lock import locked
from pipeline.errors import UserError

CLASSES = [f"class{number}" for number in range(10)]
PIXELS = np.random.default_rng(1).integers(0, 256, (6, 20, 3072), dtype=np.uint8)  # 5 training batches and the test's


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive built as CIFAR-10's is, of 120 images."""
    path = tmp_path_factory.mktemp("archive") / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:

        def add(name, value):
            data = pickle.dumps(value, protocol=2)  # as in the real archive
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        labels = [number % 10 for number in range(20)]
        for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            add(name, {"data": PIXELS[number], "labels": labels})
        add("batches.meta", {"label_names": CLASSES})
    return path


@pytest.fixture(autouse=True)
def known(archive, monkeypatch):
    """This archive has the published checksum; there is no server unless a test starts one."""
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def check(root):
    index = open_index(index_folder(root))
    assert index.synsets == tuple(CLASSES)
    assert (len(index.splits["train"]), len(index.splits["val"])) == (100, 20)
    expected = PIXELS[5][3].reshape(3, 32, 32).transpose(1, 2, 0)  # the first test image of class 3
    assert np.array_equal(np.asarray(Image.open(root / "val" / "class3" / "0000.png")), expected)
    assert {path.name for path in root.iterdir()} == {"train", "val", "index"}


def test_downloaded(archive, tmp_path, monkeypatch, capsys):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(cifar10, "URL", url)
        assert main(["fetch", "cifar10", str(tmp_path / "data")]) == 0
        server.shutdown()
    check(tmp_path / "data")
    assert "100 train and 20 val images of 10 classes" in capsys.readouterr().out
    assert main(["fetch", "cifar10", str(tmp_path / "data")]) == 0  # nothing is asked of a server
    assert "complete" in capsys.readouterr().out


def test_from_a_file_and_after_a_kill(archive, tmp_path):
    root = tmp_path / "data"
    (root / ".cifar10" / "train" / "class0").mkdir(parents=True)  # what a kill leaves
    (root / ".cifar10" / "train" / "class0" / "9999.png").write_text("half")
    assert main(["fetch", "cifar10", str(root), "--from", str(archive)]) == 0
    check(root)


def test_no_server_and_a_damaged_archive_are_one_line(archive, tmp_path, capsys):
    assert main(["fetch", "cifar10", str(tmp_path / "data")]) == 1
    assert "could not be downloaded" in capsys.readouterr().err.splitlines()[-1]
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:-50] + bytes(50))
    assert main(["fetch", "cifar10", str(tmp_path / "other"), "--from", str(damaged)]) == 2
    assert "checksum" in capsys.readouterr().err
    assert not (tmp_path / "other" / "train").exists()
    assert main(["fetch", "cifar10", str(tmp_path / "third"), "--from", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "train" / "mine").mkdir(parents=True)
    assert main(["fetch", "cifar10", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "size", "batch", "epochs"),
    [("resnet18", 224, 128, 10), ("vgg16", 224, 64, 5), ("inception_v3", 299, 32, 10), ("densenet121", 224, 32, 10)],
)
def test_the_lectures_recipes(name, size, batch, epochs):
    config = parse_config(["--config", f"cifar10-{name}-lecture"])
    assert (config.model.name, config.data.image_size, config.data.flip) == (name, size, 0)
    assert (config.train.global_batch_size, config.schedule.epochs) == (batch, epochs)
    ours = parse_config(["--config", "cifar10-resnet18-224" if name == "resnet18" else f"cifar10-{name}"])
    assert (ours.model.name, ours.data.image_size, ours.schedule.epochs) == (name, size, epochs)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    with pytest.raises(UserError, match=r"mkdir, which is not an array"):
        cifar10._ArrayUnpickler(io.BytesIO(pickle.dumps(Malicious()))).load()
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(archive, tmp_path, capsys):
    """Each would remove what the other has written, and call what is left verified."""
    root = tmp_path / "data"
    (root / cifar10.STATE).mkdir(parents=True)
    with locked(root / cifar10.STATE / "lock", "busy"):
        assert main(["fetch", "cifar10", str(root), "--from", str(archive)]) == 2
    assert f"another fetch is running in {root}" in capsys.readouterr().err
    assert main(["fetch", "cifar10", str(root), "--from", str(archive)]) == 0
    check(root)
