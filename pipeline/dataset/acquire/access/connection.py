"""Why a server can't be reached: name resolution, refused connections, certificates, proxies."""

import os
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

import requests

from pipeline.errors import UserError

PROXY_USER = (
    "the proxy asks for a user and a password (407): give them as https_proxy=http://USER:PASSWORD@HOST:PORT, "
    "or correct them there"
)
WEB_PAGE = "a web page came instead of an answer: a captive portal or a proxy's login page is in between"


def explain_connection(error: BaseException) -> str:
    """The reason of a failure that may pass, without credentials.

    Raises UserError for what waiting does not fix: a certificate that is not trusted, a proxy that wants a user.
    """
    chain = list(_causes(error))
    text = " ".join(map(str, chain))
    if "407" in text and any("tunnel" in str(cause).lower() or "proxy" in str(cause).lower() for cause in chain):
        raise UserError(PROXY_USER)
    if any(isinstance(cause, requests.exceptions.SSLError | ssl.SSLError) for cause in chain):
        if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
            bundle = os.environ.get("REQUESTS_CA_BUNDLE")
            remedy = f"the one it names, {bundle}, does not have it" if bundle else "it is not set"
            raise UserError(
                "the server's certificate is not trusted, as behind a proxy that intercepts connections: name the file "
                f"with the proxy's certificate in REQUESTS_CA_BUNDLE ({remedy})"
            )
        return "the encrypted connection failed (TLS)"
    if any(isinstance(cause, requests.exceptions.JSONDecodeError) for cause in chain):
        return WEB_PAGE
    names = {type(cause).__name__ for cause in chain}
    through = _proxy_host() if "ProxyError" in names else None
    where = f"proxy {through}: " if through else ""
    if names & {"NameResolutionError", "gaierror"}:
        return f"{where}its name can't be resolved (DNS)"
    if "ConnectionRefusedError" in names:
        return f"{where}the connection is refused"
    if names & {"ConnectTimeout", "ConnectTimeoutError", "ReadTimeout", "ReadTimeoutError", "TimeoutError"}:
        return f"{where}no answer in time"
    return f"{where}{type(error).__name__}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from or holds, each once."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        here = pending.pop(0)
        if not isinstance(here, BaseException) or id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        pending += [here.__cause__, here.__context__, getattr(here, "reason", None), *here.args]
        pending += [getattr(here, "original_error", None)]


def _proxy_host() -> str | None:
    """Host and port of the proxy that the environment names; its user and password are left out."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        if value := os.environ.get(name):
            parts = urlsplit(value if "://" in value else f"http://{value}")
            return parts.netloc.rpartition("@")[2] or None
    return None
