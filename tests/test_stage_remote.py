"""Shards from an object store: a real S3 server on this machine, whole files, cut downloads, damage, credentials."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from object_store import server  # noqa: F401 - a fixture
from test_stage import content, packed  # noqa: F401 - packed is a fixture

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.dataset.shards import stage_remote

pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
SECRET = "wJalrXUtnFEMIsecret"


@pytest.fixture
def bucket(server, packed, monkeypatch):  # noqa: F811
    """`packed`, uploaded to s3://shards/imagenet; the file system that can change it."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(endpoint_url=server, skip_instance_cache=True, use_listings_cache=False)
    files.mkdir("shards-bucket")
    for path in packed.rglob("*"):
        if path.is_file():
            files.pipe(f"shards-bucket/imagenet/{path.relative_to(packed)}", path.read_bytes())
    yield files
    files.rm("shards-bucket", recursive=True)


URL = "s3://shards-bucket/imagenet"


def stage(dest: Path) -> int:
    s3fs.S3FileSystem.clear_instance_cache()
    return main(["stage", URL, str(dest)])


def test_copies_everything_and_a_second_run_nothing(bucket, packed, tmp_path, capsys):  # noqa: F811
    local = tmp_path / "local"
    assert stage(local) == 0
    assert "3 of 3 shards copied" in capsys.readouterr().out
    assert content(local) == content(packed)
    assert open_index(local / "index").root == local.resolve()
    assert not [path for path in local.rglob(".*") if path.name != ".stage.lock"]
    before = (local / "train-0.tar").stat().st_ino
    assert stage(local) == 0
    assert "0 of 3 shards copied, 3 existed already" in capsys.readouterr().out
    assert (local / "train-0.tar").stat().st_ino == before


def test_from_an_http_server_without_sizes_in_its_listing_and_byte_ranges(packed, tmp_path, monkeypatch, capsys):  # noqa: F811
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setattr(stage_remote, "CHUNK", 2000)  # of shards of 3000
    local = tmp_path / "local"
    local.mkdir()
    (local / ".train-1.tar.stage.tmp").write_bytes((packed / "train-1.tar").read_bytes()[:500])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=packed)) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_port}"
        assert [main(["stage", url, str(local)]) for _ in range(2)] == [0, 0]
        files.shutdown()
    out = capsys.readouterr().out
    assert "3 of 3 shards copied" in out and "0 of 3 shards copied, 3 existed already" in out
    assert content(local) == content(packed)


def test_a_cut_download_goes_on_where_it_stopped(bucket, packed, tmp_path, monkeypatch):  # noqa: F811
    local = tmp_path / "local"
    local.mkdir()
    whole = (packed / "train-0.tar").read_bytes()
    (local / ".train-0.tar.stage.tmp").write_bytes(whole[:2000])
    (local / ".train-1.tar.stage.tmp").write_bytes(b"of an older upload")
    asked: list[tuple] = []
    real = s3fs.S3FileSystem._cat_file

    async def spy(self, path, version_id=None, start=None, end=None):
        asked.append((path.rpartition("/")[2], start))
        return await real(self, path, version_id, start, end)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", spy)
    assert stage(local) == 0
    assert content(local) == content(packed)
    assert [start for name, start in asked if name == "train-0.tar"] == [2000]
    assert [start for name, start in asked if name == "train-1.tar"] == [18, 0]


def test_damage_is_found_by_the_digests(bucket, packed, tmp_path, capsys):  # noqa: F811
    data = bytearray((packed / "train-1.tar").read_bytes())
    data[1500] ^= 1
    bucket.pipe("shards-bucket/imagenet/train-1.tar", bytes(data))
    assert stage(tmp_path / "local") == 1
    assert "train-1.tar does not hold the samples that its index names" in capsys.readouterr().err
    assert not (tmp_path / "local/train-1.tar").exists() and not (tmp_path / "local/index").exists()
    bucket.pipe("shards-bucket/imagenet/train-1.tar", (packed / "train-1.tar").read_bytes())
    assert stage(tmp_path / "local") == 0
    assert content(tmp_path / "local") == content(packed)


@pytest.mark.parametrize("lost", ["train-1.tar", "index/index.json", ""])
def test_what_is_not_there_is_named(bucket, tmp_path, capsys, lost):
    bucket.rm(f"shards-bucket/imagenet/{lost}".rstrip("/"), recursive=not lost)
    assert stage(tmp_path / "local") == 2
    error = capsys.readouterr().err
    assert (lost or "index.json") in error and "no such bucket or object" in error
    assert len(error.strip().splitlines()) == 1


def test_no_server_no_credentials_and_no_package(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert stage(tmp_path / "local") == 1
    error = capsys.readouterr().err
    assert "can't be read" in error and SECRET not in error and len(error.strip().splitlines()) == 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stage(tmp_path / "local") == 2
    assert "credentials" in capsys.readouterr().err
    without = tmp_path / "without/s3fs.py"
    without.parent.mkdir()
    without.write_text("raise ImportError('No module named s3fs')\n")
    paths = os.pathsep.join([str(without.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "stage", URL, str(tmp_path / "local")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "pip install s3fs" in done.stderr
    assert main(["stage", "abc://x/y", str(tmp_path / "local")]) == 2


def test_an_index_that_would_leave_the_folder_is_refused(bucket, tmp_path, capsys):
    raw = bucket.cat("shards-bucket/imagenet/index/index.json")
    bucket.pipe("shards-bucket/imagenet/index/index.json", raw.replace(b'"train-0.tar"', b'"../train-0.tar"'))
    assert stage(tmp_path / "local") == 2
    assert not list(tmp_path.glob("train-0.tar"))
