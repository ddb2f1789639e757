"""What is between this machine and Kaggle: each kind of failure is one true line with its exit code, and no secret."""

import datetime
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from fetching import QUICK, fetch
from kaggle_server import TOKEN, KaggleServer
from test_fetch_credentials import write_kaggle_json

from pipeline.dataset.acquire.access.connection import explain_connection
from pipeline.errors import UserError

PORTAL = b"<html><body>Welcome to the guest network: log in</body></html>"


class Server:
    """An HTTP or (certificate: PEM file) HTTPS server that gives every request the same answer; also as a proxy."""

    def __init__(self, status: int, body: bytes = b"", certificate: Path | None = None):
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_HEAD = do_CONNECT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.address = f"127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "Server":
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def certificate(tmp_path) -> Path:
    """A self-signed certificate with its key, as a proxy that intercepts connections shows one."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(1))
    builder = builder.not_valid_after(now + datetime.timedelta(1))
    import ipaddress

    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(names, False).sign(key, hashes.SHA256())
    path = tmp_path / "proxy.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def reason(address: str, **options) -> str:
    with pytest.raises(requests.RequestException) as caught:
        requests.get(address, timeout=10, **options).json()
    return explain_connection(caught.value)


def test_dns_refusal_and_silence_are_told_apart():
    assert reason("https://no-such-host.invalid/") == "its name can't be resolved (DNS)"
    assert reason("http://127.0.0.1:9/") == "the connection is refused"
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # it accepts, and never answers
        with pytest.raises(requests.RequestException) as caught:
            requests.get(f"http://127.0.0.1:{silent.server_address[1]}/", timeout=0.2)
        assert explain_connection(caught.value) == "no answer in time"


def test_the_proxy_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:hunter2@127.0.0.1:9")
    said = reason("https://www.kaggle.com/")
    assert said == "proxy 127.0.0.1:9: the connection is refused"


def test_a_captive_portal_is_no_answer_of_kaggle():
    with Server(200, PORTAL) as portal:
        assert "a captive portal" in reason(f"http://{portal.address}/")


def test_an_intercepting_certificate_names_the_variable(certificate, monkeypatch):
    with Server(200, b"{}", certificate) as server:
        address = f"https://{server.address}/"
        with pytest.raises(UserError, match=r"REQUESTS_CA_BUNDLE \(it is not set"):
            reason(address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert requests.get(address, timeout=10).json() == {}


def test_a_proxy_that_wants_a_user_for_tunnels(monkeypatch):
    with Server(407) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:hunter2@{proxy.address}")
        with pytest.raises(UserError, match="the proxy asks for a user") as caught:
            reason("https://www.kaggle.com/")
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "says"), [(407, 2, "the proxy asks for a user"), (200, 1, "a web page came instead")]
)
def test_fetch_through_such_a_proxy_is_one_line(kaggle_zip, tmp_path, status, code, says):
    with KaggleServer(kaggle_zip) as server, Server(status, PORTAL) as proxy:
        env = server.environment(tmp_path / "home") | {"http_proxy": f"http://me:hunter2@{proxy.address}"}
        done = fetch(tmp_path / "data", env, *QUICK, "--give_up_s", "1")
    assert done.code == code and says in done.last_line, done.err
    assert "hunter2" not in done.err + done.out and not done.out


@pytest.mark.parametrize("token", [TOKEN, "KGAT_another-token"])
def test_of_two_credentials_the_one_that_is_used_is_said(kaggle_zip, tmp_path, token):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        write_kaggle_json(tmp_path / "home")
        path = tmp_path / "home/.kaggle/access_token"
        path.write_text(token)
        path.chmod(0o600)
        done = fetch(tmp_path / "data", env, *QUICK, "--classes", "1", "--split", "val")
    json_file = tmp_path / "home/.kaggle/kaggle.json"
    if token == TOKEN:
        assert done.code == 0, done.err
        assert f"two Kaggle credentials found: using the access token of {path}, not {json_file}" in done.err
        return
    assert done.code == 2 and "another-token" not in done.err
    assert f"the access token of {path} (wrong or expired), which is used before {json_file}; remove" in done.last_line


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_kaggle_json_with_a_byte_order_mark_works(kaggle_zip, tmp_path, encoding):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        write_kaggle_json(tmp_path / "home")
        path = tmp_path / "home/.kaggle/kaggle.json"
        path.write_bytes(path.read_text().encode(encoding))
        done = fetch(tmp_path / "data", env, *QUICK, "--classes", "1", "--split", "val")
    assert done.code == 0, done.err
