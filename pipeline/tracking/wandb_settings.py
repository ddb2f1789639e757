"""What W&B's client would do here by its own variables, settings files and keys, and what a run makes of it.

The client reads `WANDB_*` variables, `~/.config/wandb/settings` (or `WANDB_CONFIG_DIR`), `./wandb/settings` and
`.netrc`. The options of the group `tracking` stand above them, but for the mode: the more private one counts.
"""

import configparser
import contextlib
import importlib.util
import netrc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import redact
from pipeline.config import TrackingConfig

DEFAULT_PROJECT = "imagenet"
REACH_S = 5.0  # seconds that a server has to answer anything at all
Mode = Literal["online", "offline", "disabled"]
_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")  # rising privacy
_OLD_NAMES: dict[str, Mode] = {"run": "online", "shared": "online", "dryrun": "offline"}


@dataclass(frozen=True)
class WandbPlan:
    """How a run uses W&B.

    Attributes:
        mode: online, offline or disabled.
        why: what decided that, in words; "" for an option of the run.
        url: of the server.
        key: is there a key for that server?
        project: of the run. entity, name: None where neither an option nor W&B's settings say one.
        folder: in which W&B makes its folder `wandb`, if its own settings say so; None: in the run folder.
        run_id: from WANDB_RUN_ID; None: the run's own.
        proxies: scheme -> proxy of W&B's settings.
        timeout_s: the client's own limit for a start, if one is set.
        variables: the `WANDB_*` variables that the client takes; see `only_variables`.
    """

    mode: Mode
    why: str
    url: str = "https://api.wandb.ai"
    key: bool = False
    project: str = DEFAULT_PROJECT
    entity: str | None = None
    name: str | None = None
    folder: Path | None = None
    run_id: str | None = None
    proxies: dict[str, str] | None = None
    timeout_s: float | None = None
    variables: dict[str, str] = field(default_factory=dict)


def is_installed() -> bool:
    """Is W&B's package here? A folder named `wandb` in the working directory is none."""
    try:
        found = importlib.util.find_spec("wandb")
    except ValueError:  # a module that says nothing of its origin
        return False
    return found is not None and found.origin is not None


def plan_wandb(config: TrackingConfig, found: tuple[dict[str, str], list[str]] | None = None) -> WandbPlan:
    """How a run with these options uses W&B in this environment. Nothing is written or sent.

    found: what `client_variables` returned, where it was asked before.
    """
    if config.wandb == "disabled":
        return WandbPlan("disabled", "")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return WandbPlan("disabled", "by WANDB_DISABLED")
    variables, refused = client_variables() if found is None else found
    try:
        own = _client_settings(variables)
    except Exception as error:  # whatever the client says of a file
        refused.append(f"W&B's settings can't be used: {_reason(error)}")
        own = {}
        with contextlib.suppress(Exception):
            own = _client_settings(variables, files=False)
    url = str(own.get("base_url") or os.environ.get("WANDB_BASE_URL") or WandbPlan.url).rstrip("/")
    key = _has_key(url, own)
    mode, why = _choose_mode(config.wandb, own, "WANDB_MODE" in variables, key, "; ".join(refused))
    folder = own.get("root_dir")
    proxies = {
        scheme: str(own[name]) for scheme, name in (("http", "http_proxy"), ("https", "https_proxy")) if own.get(name)
    }
    return WandbPlan(
        mode=mode,
        why=why,
        url=url,
        key=key,
        project=config.project or own.get("project") or DEFAULT_PROJECT,
        entity=config.entity or own.get("entity"),
        name=config.name or own.get("run_name"),
        folder=Path(folder).expanduser() if folder else None,
        run_id=own.get("run_id"),
        proxies=proxies or None,
        timeout_s=own.get("init_timeout"),
        variables=variables,
    )


def _choose_mode(
    asked: Mode | Literal["auto"], own: dict[str, Any], by_variable: bool, key: bool, broken: str
) -> tuple[Mode, str]:
    """(mode, what decided it). Of the run's option and W&B's own mode the more private one counts.

    by_variable: does W&B's own mode come from WANDB_MODE? broken: what can't be used, and might have asked for more
    privacy; then nothing is sent.
    """
    said = own.get("mode")
    theirs: Mode | None = _OLD_NAMES.get(said, said) if said is not None else None
    source = "by WANDB_MODE" if by_variable else "by W&B's settings file"
    if broken:
        return (theirs, source) if theirs == "disabled" else ("offline", broken)
    if asked == "auto":
        if theirs is not None:
            return theirs, source
        return ("online", "") if key else ("offline", "no key; `wandb login` gives one")
    if theirs is not None and _MODES.index(theirs) > _MODES.index(asked):
        return theirs, source
    return asked, ""


def client_variables() -> tuple[dict[str, str], list[str]]:
    """(the `WANDB_*` variables that the client takes, a line for each that it refuses, and would not start with). One
    that is set to nothing counts as not set; WANDB_MODE may be in capitals."""
    given = {name: value for name, value in os.environ.items() if name.startswith("WANDB_") and value.strip()}
    if "WANDB_MODE" in given:
        given["WANDB_MODE"] = given["WANDB_MODE"].strip().lower()
    if not is_installed():
        return given, []
    import wandb

    refused: dict[str, str] = {}
    for name, value in given.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except Exception as error:  # whatever the client says of it
            shown = name if redact.is_secret(name) else f"{name}={os.environ[name]}"
            refused[name] = f"{shown} can't be used: {_reason(error)}"
    return {name: value for name, value in given.items() if name not in refused}, list(refused.values())


@contextlib.contextmanager
def only_variables(variables: dict[str, str]) -> Iterator[None]:
    """The environment with these `WANDB_*` variables alone, which the client takes, while it starts."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    for name in before:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def _reason(error: Exception) -> str:
    """What the client says, in one line."""
    problems = getattr(error, "errors", None)  # pydantic's
    lines = [item["msg"] for item in problems()] if callable(problems) else str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0][:200]


def _client_settings(variables: dict[str, str], files: bool = True) -> dict[str, Any]:
    """Name -> value of the settings that the client's files, unless they are left out, and these variables give; where
    it is not installed, only the mode."""
    if not is_installed():
        mode = variables.get("WANDB_MODE")
        return {"mode": mode} if mode else {}
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    found = wandb.Settings()
    if files:
        _read_files(found)
    found.update_from_env_vars(variables)
    given = {name: getattr(found, name) for name in found.model_fields_set}
    if not os.environ.get("WANDB_DIR"):
        given.pop("root_dir", None)
    return given


def _read_files(found: Any) -> None:
    """Add to the client's settings what its files say. Raises where they can't be used."""
    place = os.environ.get("WANDB_CONFIG_DIR")
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.settings_system = str(Path(place or "~/.config/wandb").expanduser() / "settings")
    before = set(found.model_fields_set)
    found.update_from_system_settings()
    files = [path for path in (found.settings_system, getattr(found, "settings_workspace", None)) if path]
    if set(found.model_fields_set) == before:  # the client passes over all of them where it refuses a value
        _refuse_settings(files)


def _refuse_settings(files: list[str]) -> None:
    """Raises ValueError that names a settings file which says something: what it says may be to send nothing."""
    for file in files:
        settings = configparser.ConfigParser(interpolation=None)
        try:
            says = settings.read(file) and any(settings.items(name) for name in settings.sections())
        except (configparser.Error, ValueError):
            says = True
        if says or settings.defaults():
            raise ValueError(f"it refuses a value in {file}")


def _has_key(url: str, own: dict[str, Any]) -> bool:
    """Is there a key for W&B's server: in the environment, a settings file, or in .netrc from `wandb login`?"""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or own.get("api_key"):
        return True
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            # The client names a server by host and port.
            if netrc.netrc(Path(place).expanduser()).authenticators(urlsplit(url).netloc) is not None:
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
    return False


def find_problem(plan: WandbPlan) -> str | None:
    """Why the server can't be used, None if it answers. Takes `REACH_S` seconds at most, a name that nobody resolves
    included: W&B's client itself would wait for as long as a start may take."""
    import requests

    limit_s = REACH_S
    found: list[str | None] = []

    def ask() -> None:
        try:
            answer = requests.get(plan.url, timeout=limit_s, proxies=plan.proxies, allow_redirects=False)
            found.append(f"answers {answer.status_code}" if answer.status_code >= 500 else None)
        except requests.exceptions.SSLError:
            found.append(None)  # it is there; the client has its own certificates
        except requests.exceptions.Timeout:
            found.append(f"did not answer in {limit_s:g} s")
        except (requests.exceptions.RequestException, ValueError, OSError):
            found.append("can't be reached")

    asking = threading.Thread(target=ask, name="W&B's server", daemon=True)
    asking.start()
    asking.join(limit_s)
    return found[0] if found else f"did not answer in {limit_s:g} s"
