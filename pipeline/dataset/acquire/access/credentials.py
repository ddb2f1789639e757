"""Kaggle's credentials as they lie on disks: found where users put them, byte order marks skipped, or named as broken.

The client reads `KAGGLE_API_TOKEN`, `~/.kaggle/access_token` and `kaggle.json`, and passes over in silence
whatever it can't read. The rest is passed to it by variables of this process. Nothing is
printed.
"""

import codecs
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
TOKEN_NAMES = ("access_token", "access_token.txt")
TOKEN, USER, KEY, FOLDER = "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"
SETTINGS_PAGE = "https://www.kaggle.com/settings"
OAUTH = Path("~/.kaggle/credentials.json")  #: of `kaggle auth login`, which the client reads itself


@dataclass(frozen=True)
class Found:
    """Where an access token and where a user with a key were found; None: nowhere. login: is there `OAUTH`?"""

    token: str | None
    key: str | None
    login: bool = False


def prepare_credentials() -> Found:
    """Find the credentials and hand them to the client. Call it before `import kaggle`.

    Raises UserError, naming the file, where one is broken that the client would use, or fall over.
    """
    token = key = None
    if (folder := os.environ.get(FOLDER, "")).startswith("~"):  # set in quotes, or by no shell
        os.environ[FOLDER] = str(Path(folder).expanduser())
    broken: UserError | None = None
    try:
        token = _find_token()
    except _Empty as error:
        broken = error
    try:
        key = _find_key()
    except _NoObject:
        raise
    except UserError as error:
        if token is not None:
            print(f"{error} (using the access token of {token})", file=sys.stderr, flush=True)
        broken = broken or error
    if token is None and key is None and broken is not None:
        raise broken
    return Found(token, key, OAUTH.expanduser().exists())


class _Empty(UserError):
    """An access token's file without one, which the client passes over."""


class _NoObject(UserError):
    """A kaggle.json whose JSON is not an object, on which the client ends."""


def _find_token() -> str | None:
    value = os.environ.get(TOKEN)
    if value is not None and not value.strip("\ufeff \t\r\n"):
        del os.environ[TOKEN]  # set to nothing: as if it were not set
        value = None
    if value:
        path = Path(value)
        if len(value) > 255 or not path.is_file():
            if path.is_absolute() or value.startswith(("~", ".")):
                raise UserError(f"{TOKEN} names a file that is not there; set it to the token itself")
            os.environ[TOKEN] = _plain(_bare_token(value), TOKEN)
            return TOKEN
        os.environ[TOKEN] = _read_token(path)
        return f"{TOKEN} ({path})"
    for path in (folder / name for folder in _token_folders() for name in TOKEN_NAMES):
        if path.exists():
            os.environ[TOKEN] = _read_token(path)
            return str(path)
    return None


def _token_folders() -> list[Path]:
    """Where access tokens are looked for: the client's own folder, then the one that is set."""
    folders = [Path.home() / ".kaggle"]
    if folder := os.environ.get(FOLDER):
        folders.append(Path(folder))
    return folders


def _bare_token(text: str) -> str:
    """A token without what often stands around it: quotes, and the name of the variable."""
    text = text.strip("\ufeff \t\r\n").removeprefix("export ").strip().removeprefix(f"{TOKEN}=").strip()
    return text[1:-1].strip() if text[:1] in ("'", '"') and text[-1:] == text[:1] else text


def _read_token(path: Path) -> str:
    text = _bare_token(_read_text(path))
    if not text:
        raise _Empty(f"{path} is empty; put the access token into it, or remove it")
    if text.startswith(("{", "[")):
        raise UserError(
            f"{path} holds JSON, not an access token; if it is the key of an older kind, name it kaggle.json"
        )
    return _plain(text, str(path))


def _plain(token: str, where: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{where} holds more than an access token; put the token alone into it, or remove it")
    return token


def _find_key() -> str | None:
    for name in (USER, KEY):
        if value := os.environ.get(name):
            os.environ[name] = value.strip().strip("'\"")  # a container's --env-file leaves quotes where they are
            if not value.isascii():
                raise UserError(
                    f"{name} holds characters that no user name or key has; copy it from {SETTINGS_PAGE} again"
                )
    given = [name for name in (USER, KEY) if os.environ.get(name)]
    if len(given) == 2:
        return f"{USER} and {KEY}"
    path = config_folder() / "kaggle.json"
    if not path.exists():
        return None
    os.environ[USER], os.environ[KEY] = _read_key(path)
    if given:
        print(f"{given[0]} alone is set: using user and key of {path}", file=sys.stderr, flush=True)
    return str(path)


def _read_key(path: Path) -> tuple[str, str]:
    expected = 'expected {"username": "...", "key": "..."}; download it again from ' + SETTINGS_PAGE
    text = _read_text(path).strip()
    if not text:
        raise UserError(f"{path} is empty; {expected}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is cut or no JSON; {expected}") from None
    if not isinstance(found, dict):
        raise _NoObject(f"{path} holds a {type(found).__name__}; {expected}")
    for name in ("username", "key"):
        if not isinstance(found.get(name), str) or not found[name].strip():
            raise UserError(f"{path} has no text under '{name}'; {expected}")
        if not found[name].isascii():
            raise UserError(f"{path} has characters under '{name}' that no user name or key has; {expected}")
    return found["username"].strip(), found["key"].strip()


def explain_none() -> str:
    """Where credentials were looked for in vain, and what looks as if it were meant as such."""
    looked = f"looked at {TOKEN}, {_token_folders()[-1] / TOKEN_NAMES[0]} and {config_folder() / 'kaggle.json'}"
    for name, other in ((USER, KEY), (KEY, USER)):
        if os.environ.get(name) and not os.environ.get(other):
            return f"{looked}; {name} is set without {other}"
    folder = os.environ.get(FOLDER)
    if folder and not Path(folder).is_dir():
        return f"{looked}; {FOLDER} names {folder}, which is not a folder"
    for place in dict.fromkeys((config_folder(), Path.home() / ".kaggle", Path.home() / "Downloads", Path.home())):
        for path in sorted(place.glob("*.[jJ][sS][oO][nN]*")):
            if path.name.lower().startswith("kaggle") and path.is_file():
                return f"{looked}; {path} may be meant: name it {config_folder() / 'kaggle.json'}"
    return looked


def config_folder() -> Path:
    """Where the client looks for kaggle.json."""
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    home = Path.home() / ".kaggle"
    if home.exists():
        return home
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; remove it, and put the file there")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); fix that: chmod 600 {path}") from None
    try:
        return data.decode(next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; download it again from {SETTINGS_PAGE}") from None
