"""Kaggle's credentials as they lie on disks: found where users put them, byte order marks skipped, or named as broken.

The client reads `KAGGLE_API_TOKEN`, `~/.kaggle/access_token` and `kaggle.json`, and passes over in silence
whatever it can't read. The rest is passed to it by variables of this process. Nothing is
printed.
"""

import codecs
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
TOKEN_NAMES = ("access_token", "access_token.txt")
TOKEN, USER, KEY, FOLDER = "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"


@dataclass(frozen=True)
class Found:
    """Where an access token and where a user with a key were found; None: nowhere."""

    token: str | None
    key: str | None


def prepare_credentials() -> Found:
    """Find the credentials and hand them to the client. Call it before `import kaggle`.

    Raises UserError, naming the file, where the only ones that are there are broken.
    """
    broken: UserError | None = None
    token = key = None
    try:
        token = _find_token()
    except UserError as error:
        broken = error
    try:
        key = _find_key()
    except UserError as error:
        broken = broken or error
    if token is None and key is None and broken is not None:
        raise broken
    return Found(token, key)


def _find_token() -> str | None:
    value = os.environ.get(TOKEN)
    if value is not None and not value.strip("\ufeff \t\r\n"):
        del os.environ[TOKEN]  # set to nothing: as if it were not set
        value = None
    if value:
        path = Path(value)
        if len(value) > 255 or not path.is_file():
            os.environ[TOKEN] = value.strip("\ufeff \t\r\n")
            return TOKEN
        os.environ[TOKEN] = _read_token(path)
        return f"{TOKEN} ({path})"
    homes = [Path.home() / ".kaggle"]
    if folder := os.environ.get(FOLDER):
        homes.append(Path(folder))
    for path in (home / name for home in homes for name in TOKEN_NAMES):
        if path.is_file():
            os.environ[TOKEN] = _read_token(path)
            return str(path)
    return None


def _read_token(path: Path) -> str:
    text = _read_text(path).strip()
    if not text:
        raise UserError(f"{path} is empty; put the access token into it")
    if text.startswith(("{", "[")):
        raise UserError(f"{path} holds JSON, no access token; if it is the key of an older kind, name it kaggle.json")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{path} holds more than an access token; put the token alone into it")
    return text


def _find_key() -> str | None:
    if os.environ.get(USER) and os.environ.get(KEY):
        return f"{USER} and {KEY}"
    path = config_folder() / "kaggle.json"
    if not path.is_file():
        return None
    username, key = _read_key(path)
    os.environ.setdefault(USER, username)
    os.environ.setdefault(KEY, key)
    return str(path)


def _read_key(path: Path) -> tuple[str, str]:
    expected = 'expected {"username": "...", "key": "..."}; download it again from https://www.kaggle.com/settings'
    text = _read_text(path).strip()
    if not text:
        raise UserError(f"{path} is empty; {expected}")
    try:
        found = json.loads(text)
    except ValueError:
        raise UserError(f"{path} is cut or no JSON; {expected}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; {expected}")
    for name in ("username", "key"):
        if not isinstance(found.get(name), str) or not found[name].strip():
            raise UserError(f"{path} has no text under '{name}'; {expected}")
    return found["username"].strip(), found["key"].strip()


def config_folder() -> Path:
    """Where the client looks for kaggle.json."""
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    home = Path.home() / ".kaggle"
    if home.exists():
        return home
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); mend that: chmod 600 {path}") from None
    try:
        return data.decode(next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; download it again from https://www.kaggle.com/settings") from None
