"""An S3 server on this machine."""

import pytest


@pytest.fixture(scope="module")
def server():
    """Its address."""
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()
