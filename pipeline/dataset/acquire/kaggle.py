"""Kaggle through its own client: who asks, and where the archive lies now. Credentials are never printed.

The client authenticates and gives the archive's signed address; the bytes are read by `remote`. `download` is the
client's own way, for servers without byte ranges.
"""

import contextlib
import errno
import importlib.metadata
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from pipeline.dataset.acquire.access.backoff import Backoff, Patience, parse_retry_after
from pipeline.dataset.acquire.access.connection import PROXY_USER, explain_connection
from pipeline.dataset.acquire.access.credentials import OAUTH, SETTINGS_PAGE, Found, explain_none, prepare_credentials
from pipeline.dataset.acquire.access.remote import BUSY, REFUSED, Address
from pipeline.dataset.disk import explain
from pipeline.errors import TransientError, UserError
from pipeline.progress import Progress

COMPETITION = "imagenet-object-localization-challenge"
NEEDED = (2, 2, 5)  # older ones can corrupt a partial zip
CALLS, CALL_EVERY_S = 6, 60.0  # asking for addresses: so many at once, then one a minute
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
FIRST_CONTACT_S = 60.0  # a machine without internet gets its error after a minute, not after give_up_s
HOW_TO = (
    f"open {SETTINGS_PAGE}, choose 'Create New Token', and put it into ~/.kaggle/access_token "
    "(or kaggle.json into ~/.kaggle), then chmod 600"
)


def rules_page(competition: str) -> str:
    return f"https://www.kaggle.com/competitions/{competition}/rules"


class _Calls:
    """A bound on the rate of API calls: Kaggle punishes those who hammer its download calls."""

    def __init__(self, stop: threading.Event):
        self.stop, self.left, self.since = stop, float(CALLS), time.monotonic()

    def take(self) -> None:
        now = time.monotonic()
        self.left = min(CALLS, self.left + (now - self.since) / CALL_EVERY_S)
        self.since = now
        wait = max(0.0, 1 - self.left) * CALL_EVERY_S
        if wait > 5:
            print(f"asking Kaggle for an address again in {wait:.0f} s", file=sys.stderr, flush=True)
        if self.stop.wait(wait):
            raise TransientError("stopped")
        self.left -= 1


@contextlib.contextmanager
def _bounded_waits(stall_s: float) -> Iterator[None]:
    """Give the client's requests a timeout: most have none, so a stalled server would block them forever."""
    send = HTTPAdapter.send

    def send_bounded(self: HTTPAdapter, request: Any, stream: bool = False, timeout: Any = None, **rest: Any) -> Any:
        if timeout is None or (isinstance(timeout, int | float) and timeout > stall_s):
            timeout = (min(10.0, stall_s), stall_s)
        return send(self, request, stream=stream, timeout=timeout, **rest)

    setattr(HTTPAdapter, "send", send_bounded)  # noqa: B010 - a method is replaced
    try:
        yield
    finally:
        setattr(HTTPAdapter, "send", send)  # noqa: B010


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """The client prints help texts, and what it prints may name a token."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class Kaggle:
    """One competition's archive. Raises UserError for what the user must fix (credentials, rules, name)."""

    def __init__(self, competition: str, patience: Patience, stop: threading.Event):
        self.competition, self.patience, self.stop = competition, patience, stop
        self._calls = _Calls(stop)
        self._begin, self._reached = time.monotonic(), False
        self._api = self._authenticate()

    def _authenticate(self) -> Any:
        """The client's own `KaggleApi`, authenticated as it does it: access token, then kaggle.json, then OAuth."""
        for name in ("VERBOSE", "VERBOSE_OUTPUT"):  # they make the client print headers and hold whole bodies
            os.environ.pop(name, None)
        found = prepare_credentials()
        backoff = Backoff(self.patience, self.stop)
        with _bounded_waits(self.patience.stall_s):
            try:
                with _muted():
                    import kaggle  # it authenticates on import
            except ImportError as error:
                raise UserError("the kaggle package is missing; install it: pip install 'kaggle>=2.2.5'") from error
            except requests.RequestException as error:
                raise TransientError(f"Kaggle can't be reached ({explain_connection(error)})") from None
            except OSError as error:
                raise UserError(
                    f"the kaggle client can't use its folder ({error}); set KAGGLE_CONFIG_DIR to one that it can write"
                ) from None
            api = kaggle.api
            _warn_of_readable_credentials(Path(api.config))
            while not api.config_values.get(api.CONFIG_NAME_AUTH_METHOD):
                self._calls.take()
                try:
                    with _muted():
                        api.authenticate()
                except SystemExit:
                    raise _no_credentials(found) from None
                except requests.RequestException as error:
                    self._judge(error, backoff)
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    if not found.login:
                        raise
                    raise UserError(f"{OAUTH} (of kaggle auth login) is broken; remove it, and {HOW_TO}") from error
            _say_which(found, api.config_values[api.CONFIG_NAME_AUTH_METHOD])
        return api

    def _judge(self, error: requests.RequestException, backoff: Backoff) -> None:
        """Raise what `error` of an API call means for the user, or wait for the next try."""
        response = error.response
        if response is None:
            reason = explain_connection(error)
            if not self._reached and time.monotonic() - self._begin > FIRST_CONTACT_S:
                raise TransientError(
                    f"Kaggle can't be reached ({reason}); is this machine on the internet, and a proxy "
                    "named in https_proxy if it needs one?"
                ) from None
            backoff.wait("Kaggle", f"can't be reached ({reason})")
            return
        self._reached = True
        status, from_storage = response.status_code, bool(response.history)
        asked = parse_retry_after(response.headers.get("Retry-After"))
        if status in BUSY or (from_storage and status in REFUSED):
            if asked and asked >= 5:
                print(f"Kaggle answered {status} and asks to wait {asked:.0f} s", file=sys.stderr, flush=True)
            who = "Kaggle's storage refuses a freshly signed address" if from_storage else "Kaggle"
            backoff.wait(who, f"it answered {status}", asked)
        elif status == 407:
            raise UserError(PROXY_USER)
        elif status == 401:
            raise UserError(f"Kaggle does not accept the credentials (401); {HOW_TO}") from None
        elif status == 403:
            page = rules_page(self.competition)
            raise UserError(f"Kaggle refuses {self.competition} (403): open {page}, accept the rules, and try again")
        elif status == 404:
            raise UserError(f"Kaggle has no competition '{self.competition}' (404); check --competition") from None
        else:
            raise TransientError(f"Kaggle answered {status} to the download call; try again later") from None

    def sign(self) -> Address:
        """A fresh address of the archive, its size and ETag; the client follows the redirect, the body stays unread."""
        from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest

        request = ApiDownloadDataFilesRequest()
        request.competition_name = self.competition
        backoff = Backoff(self.patience, self.stop)
        while True:
            self._calls.take()
            try:
                with _bounded_waits(self.patience.stall_s), self._api.build_kaggle_client() as client:
                    response = client.competitions.competition_api_client.download_data_files(request)
                    response.close()
            except requests.RequestException as error:
                self._judge(error, backoff)
                continue
            if not response.history or "html" in response.headers.get("Content-Type", ""):
                backoff.wait("Kaggle", "a web page came instead of the archive (a login page or a proxy in between?)")
                continue
            self._reached = True
            length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length")
            return Address(response.url, int(length) if length else None, response.headers.get("ETag", ""))

    def download(self, folder: Path, size: int | None) -> Path:
        """The whole archive into `folder` by the client's own download; resumes a partial one.

        Raises TransientError where it is incomplete: exit code and size are the client's only checks.
        """
        check_version()
        backoff = Backoff(self.patience, self.stop)
        seen = 0
        with Progress(f"Downloading {self.competition}", size, "bytes") as progress:
            while True:
                self._calls.take()
                error = self._download_once(folder, progress)
                found = sorted(folder.glob(f"{self.competition}.*"), key=lambda path: len(path.name))
                file = next((path for path in found if not path.name.endswith(".kaggle-partial")), None)
                have = file.stat().st_size if file else 0
                if error is None and file:
                    error = _find_fault(file, size)
                    if error is None:
                        return file
                    file.unlink()
                if have > seen:
                    backoff.progressed()
                seen = have
                if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                    raise explain(error, folder) from error
                if isinstance(error, requests.HTTPError):
                    self._judge(error, backoff)
                else:
                    reason = str(error) if isinstance(error, ValueError) else type(error).__name__
                    backoff.wait("Kaggle", f"the download broke ({reason})")

    def _download_once(self, folder: Path, progress: Progress) -> Exception | None:
        result: list[Exception] = []

        def work() -> None:
            try:
                self._api.competition_download_files(self.competition, str(folder), quiet=True)
            except (requests.RequestException, OSError, ValueError) as error:
                result.append(error)

        with _bounded_waits(self.patience.stall_s), _muted_stdout():
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(0.1)
                have = sum(path.stat().st_size for path in folder.glob(f"{self.competition}.*"))
                progress.advance(max(0, have - progress.count))
        return result[0] if result else None


def _find_fault(file: Path, size: int | None) -> ValueError | None:
    """What is wrong with a download that the client calls complete; None where it looks like the archive."""
    with file.open("rb") as opened:
        if opened.read(2) not in (b"PK", b"\x1f\x8b"):
            return ValueError("a web page or other text came instead of the archive")
    have = file.stat().st_size
    return ValueError(f"{have:,} bytes came instead of {size:,}") if size not in (None, have) else None


@contextlib.contextmanager
def _muted_stdout() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def check_version() -> None:
    """UserError where the client's own download is known to spoil files."""
    version = importlib.metadata.version("kaggle")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < NEEDED:
        raise UserError(f"kaggle {version} can corrupt a partial zip; upgrade it: pip install 'kaggle>=2.2.5'")


def _no_credentials(found: Found) -> UserError:
    if found.token is not None:
        return UserError(f"Kaggle does not accept the access token of {found.token} (wrong or expired); {HOW_TO}")
    if found.login:  # the client has removed the file, perhaps
        return UserError(f"{OAUTH} (of kaggle auth login) has expired or is broken: log in again, or {HOW_TO}")
    return UserError(f"no Kaggle credentials found ({explain_none()}); {HOW_TO}")


def _say_which(found: Found, method: str) -> None:
    """Two credentials are two accounts, perhaps: say which one was used.

    Raises UserError for a token that is not accepted: the client sends it in every call, whatever else is there.
    """
    if found.token is None or found.key is None:
        return
    if method.endswith("ACCESS_TOKEN"):
        print(
            f"two Kaggle credentials found: using the access token of {found.token}, not {found.key}", file=sys.stderr
        )
    else:
        raise UserError(
            f"Kaggle does not accept the access token of {found.token} (wrong or expired), which is used before "
            f"{found.key}; remove or renew it (see {SETTINGS_PAGE})"
        )


def _warn_of_readable_credentials(config: Path) -> None:
    for path in (config, config.parent / "access_token", Path.home() / ".kaggle/access_token"):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & 0o077:
            print(f"warning: {path} can be read by other users; fix it: chmod 600 {path}", file=sys.stderr)
            return
