"""Who asks: missing, wrong and careless credentials, and rules that were not accepted; each tells what to do.

Every run is searched for the key, the token and the signed address's signature by `fetching.fetch`.
"""

import json
import os
import re
from pathlib import Path

import pytest
from fetching import QUICK, fetch
from kaggle_server import KEY, TOKEN, USER, Faults, KaggleServer

from pipeline.dataset.acquire.access.credentials import explain_none, prepare_credentials
from pipeline.errors import UserError

SETTINGS = "https://www.kaggle.com/settings"


def write_kaggle_json(home, key: str = KEY, mode: int = 0o600) -> None:
    (home / ".kaggle").mkdir(parents=True, exist_ok=True)
    path = home / ".kaggle/kaggle.json"
    path.write_text(json.dumps({"username": USER, "key": key}))
    path.chmod(mode)


@pytest.mark.parametrize("kind", ["none", "wrong key", "wrong token", "wrong token file"])
def test_bad_credentials_name_the_page(kaggle_zip, tmp_path, kind):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        if kind == "wrong key":
            write_kaggle_json(tmp_path / "home", key="another-key")
        elif kind == "wrong token":
            env["KAGGLE_API_TOKEN"] = "KGAT_another-token"
        elif kind == "wrong token file":
            (tmp_path / "home/.kaggle").mkdir()
            (tmp_path / "home/.kaggle/access_token").write_text("KGAT_another-token")
            (tmp_path / "home/.kaggle/access_token").chmod(0o600)
        done = fetch(tmp_path / "data", env, *QUICK)
    assert done.code == 2
    assert SETTINGS in done.last_line and "kaggle.json" in done.last_line
    assert len(done.err.strip().splitlines()) == 1 and not done.out
    assert "another-" not in done.err
    assert {"none": "no Kaggle credentials", "wrong key": "401"}.get(kind, "access token") in done.last_line


def test_rules_that_were_not_accepted_name_the_page(kaggle_zip, tmp_path):
    with KaggleServer(kaggle_zip, Faults(api_always=403)) as server:
        done = fetch(tmp_path / "data", server.environment(tmp_path / "home"), *QUICK)
        assert len(server.api_calls) == 1, "asking again would not help"
    assert done.code == 2
    assert "https://www.kaggle.com/competitions/imagenet-object-localization-challenge/rules" in done.last_line


@pytest.mark.parametrize("how", ["file", "variable", "kaggle.json"])
def test_every_kind_of_credentials_works(kaggle_zip, tmp_path, how):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        if how == "variable":
            env["KAGGLE_API_TOKEN"] = TOKEN
        elif how == "file":
            (tmp_path / "home/.kaggle").mkdir()
            (tmp_path / "home/.kaggle/access_token").write_text(TOKEN)
            (tmp_path / "home/.kaggle/access_token").chmod(0o600)
        else:
            write_kaggle_json(tmp_path / "home")
        done = fetch(tmp_path / "data", env, *QUICK, "--classes", "1", "--split", "val")
        assert done.code == 0, done.err
        assert "warning" not in done.err
        assert not server.problems


def test_readable_kaggle_json_is_warned_of(kaggle_zip, tmp_path):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        write_kaggle_json(tmp_path / "home", mode=0o644)
        done = fetch(tmp_path / "data", env, *QUICK, "--classes", "1", "--split", "val")
    assert done.code == 0, done.err
    path = tmp_path / "home/.kaggle/kaggle.json"
    assert f"warning: {path} can be read by other users" in done.err and f"chmod 600 {path}" in done.err


def test_kaggle_that_cannot_be_reached_is_one_line(kaggle_zip, tmp_path):
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home")
    done = fetch(tmp_path / "data", env, *QUICK, "--give_up_s", "1")
    assert done.code == 1
    assert "Kaggle" in done.last_line and "can't be reached" in done.last_line


def test_verbose_client_prints_no_secret(kaggle_zip, tmp_path):
    """VERBOSE=1 makes the client print its headers, and hold the whole archive in memory."""
    with KaggleServer(kaggle_zip) as server:
        env = {**server.environment(tmp_path / "home"), "VERBOSE": "1", "KAGGLE_API_TOKEN": TOKEN}
        done = fetch(tmp_path / "data", env, *QUICK, "--classes", "1", "--split", "val")
    assert done.code == 0, done.err
    assert "Authorization" not in done.out + done.err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("kaggle.json", b"", "is empty"),
        ("kaggle.json", b'{"username": "somebody", "key":', "is cut or no JSON"),
        ("kaggle.json", b'["somebody", "key"]', "holds a list"),
        ("kaggle.json", b'{"username": "somebody"}', "no text under 'key'"),
        ("kaggle.json", '{"username": "somebody", "key": "\u201cabc\u201d"}'.encode(), "characters under 'key'"),
        ("access_token", b" \n", "is empty"),
        ("access_token", b'{"username": "a", "key": "b"}', "holds JSON"),
        ("kaggle.json/file", b"", "kaggle.json is a folder"),
        ("access_token/file", b"", "access_token is a folder"),
    ],
)
@pytest.mark.parametrize("beside", ["nothing", "a good one"])
def test_a_broken_credentials_file_is_named(home, monkeypatch, capsys, name, content, says, beside):
    """With another one beside it, too, where the client would use it or fall over it; else a line says what is used."""
    path = home / ".kaggle" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if beside == "a good one" and name.startswith("kaggle.json"):
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        if not says.startswith("holds a list"):
            assert prepare_credentials().token == "KAGGLE_API_TOKEN"
            assert re.search(says, capsys.readouterr().err)
            return
    elif beside == "a good one":
        write_kaggle_json(home)
        if says == "is empty":  # the client passes over it
            assert prepare_credentials().key == str(home / ".kaggle/kaggle.json")
            return
    with pytest.raises(UserError, match=says):
        prepare_credentials()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder without credentials, and none in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.setenv(variable, "")
    return tmp_path


@pytest.mark.parametrize(
    "text", [f'"{TOKEN}"', f"KAGGLE_API_TOKEN={TOKEN}\n", f"export KAGGLE_API_TOKEN='{TOKEN}'\r\n"]
)
def test_what_stands_around_a_token_is_left_out(home, text):
    (home / ".kaggle").mkdir()
    (home / ".kaggle/access_token").write_text(text)
    prepare_credentials()
    assert os.environ["KAGGLE_API_TOKEN"] == TOKEN


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KAGGLE_KEY", "\u043a\u043b\u044e\u0447", "KAGGLE_KEY holds characters that no user name or key has"),
        ("KAGGLE_API_TOKEN", "KGAT_\u043a\u043b\u044e\u0447", "KAGGLE_API_TOKEN holds more than an access token"),
        ("KAGGLE_API_TOKEN", f"{TOKEN}\nanother", "KAGGLE_API_TOKEN holds more than an access token"),
    ],
)
def test_what_no_request_can_carry_is_told(home, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as raised:
        prepare_credentials()
    assert value not in str(raised.value)


def test_quotes_and_a_tilde_that_no_shell_has_taken(home, monkeypatch):
    """As in the file of `docker run --env-file`."""
    write_kaggle_json(home)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "~/.kaggle")
    assert prepare_credentials().key == str(home / ".kaggle/kaggle.json")
    for name, value in (("KAGGLE_USERNAME", USER), ("KAGGLE_KEY", KEY)):
        monkeypatch.setenv(name, f'"{value}"\r')
    prepare_credentials()
    assert (os.environ["KAGGLE_USERNAME"], os.environ["KAGGLE_KEY"]) == (USER, KEY)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "is broken; remove it"),
        ('{"refresh_token": "a", "access_token": "b", "access_token_expiration": "soon"}', "is broken; remove it"),
        ('{"refresh_token"', "has expired or is broken"),
    ],
)
def test_a_broken_login_is_named(kaggle_zip, tmp_path, content, says):
    """The file of `kaggle auth login`, on which the client itself ends with a traceback."""
    with KaggleServer(kaggle_zip) as server:
        env = server.environment(tmp_path / "home", credentials=False)
        (tmp_path / "home/.kaggle").mkdir()
        (tmp_path / "home/.kaggle/credentials.json").write_text(content)
        done = fetch(tmp_path / "data", env, *QUICK)
    assert done.code == 2
    assert f"~/.kaggle/credentials.json (of kaggle auth login) {says}" in done.last_line
    assert SETTINGS in done.last_line


def test_a_user_without_a_key_takes_both_from_the_file(home, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_USERNAME", "another")
    write_kaggle_json(home)
    prepare_credentials()
    assert (os.environ["KAGGLE_USERNAME"], os.environ["KAGGLE_KEY"]) == (USER, KEY)
    assert "KAGGLE_USERNAME alone is set" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".kaggle/kaggle (1).json", ".kaggle/Kaggle.json", "Downloads/kaggle.json"])
def test_a_file_that_may_be_meant_is_named(home, name):
    assert prepare_credentials().key is None
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_text("{}")
    assert f"{home / name} may be meant" in explain_none()


def test_each_place_that_was_looked_at_is_named(home, tmp_path, monkeypatch):
    (home / ".kaggle").mkdir(exist_ok=True)
    own = home / ".kaggle"
    assert f"looked at KAGGLE_API_TOKEN, {own / 'access_token'} and {own / 'kaggle.json'}" == explain_none()
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    assert f"{tmp_path / 'access_token'} and {tmp_path / 'kaggle.json'}" in explain_none()


def test_a_variable_that_names_no_file_is_told(home, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(home / "token.txt"))
    with pytest.raises(UserError, match="names a file that is not there"):
        prepare_credentials()


@pytest.mark.parametrize("folder", [".kaggle", "elsewhere"])
def test_a_token_with_a_byte_order_mark_or_in_the_configuration_folder_is_found(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "access_token").write_bytes(b"\xef\xbb\xbf" + TOKEN.encode() + b"\r\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "")
    assert prepare_credentials().token == str(tmp_path / folder / "access_token")
    assert os.environ["KAGGLE_API_TOKEN"] == TOKEN
