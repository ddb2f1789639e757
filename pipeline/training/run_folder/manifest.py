"""What a checkpoint's manifest, `meta.json`, says, and whether the folder is what was written. Nothing is loaded.

The manifest holds the step, the blacklist, the fingerprints of recipe and index, each file's size and xxh3_128 digest,
and a digest of itself. Knows no torch.
"""

import contextlib
import errno
import json
from collections.abc import Callable
from pathlib import Path

import xxhash

from pipeline.counts import count
from pipeline.errors import TransientError, permission_problem
from pipeline.run_paths import META, list_checkpoints

FORMAT = 1
#: what the operating system says where a file is missing, or its part of the disk is bad; all else is no fault of it
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EUCLEAN, errno.EBADMSG}


class DamagedCheckpoint(Exception):
    """A checkpoint folder that is not what was written; the message names it and the fault.

    `may_pass`: the disk failed to read it, which may be otherwise in a moment.
    """

    def __init__(self, message: str, may_pass: bool = False):
        super().__init__(message)
        self.may_pass = may_pass


def _reading_problem(path: Path, name: str, error: OSError) -> Exception:
    """What it means that a file of a checkpoint can't be read. Only a damaged checkpoint is passed over for the one
    before it: one that this account may not read, or whose server is away for a moment, is as good as before."""
    if isinstance(error, PermissionError):
        return permission_problem(error)
    message = f"checkpoint {path}: {name} can't be read ({error.strerror})"
    if error.errno in _OF_THE_FILE:
        return DamagedCheckpoint(message, may_pass=error.errno == errno.EIO)
    return TransientError(f"{message}; nothing was changed, try again")


def seal(meta: dict) -> bytes:
    """A manifest as JSON, with a digest of itself."""
    body = {key: value for key, value in meta.items() if key != "digest"}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "digest": digest}, indent=1, sort_keys=True).encode()


def _digest_file(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def _is_complete(meta: dict) -> bool:
    """Has a manifest what loading looks at, in the right types? Its digest may be right though it is not ours."""
    files = meta.get("files")
    return (
        isinstance(meta.get("step"), int)
        and isinstance(files, dict)
        and all(name == Path(name).name and isinstance(entry, dict) for name, entry in files.items())
        and all(isinstance(entry.get("size"), int) and "xxh3_128" in entry for entry in files.values())
        and isinstance(meta.get("semantic_config", {}), dict)
        and all(isinstance(meta.get(name, []), list) for name in ("blacklist", "rollbacks", "begun_from"))
    )


def read_meta(path: Path) -> dict:
    """The verified `meta.json` of a checkpoint folder. Raises DamagedCheckpoint, and what `_reading_problem` says."""
    try:
        meta = json.loads((path / META).read_bytes())
        if not isinstance(meta, dict) or json.loads(seal(meta)) != meta:
            raise DamagedCheckpoint(f"checkpoint {path}: {META} is damaged")
        if meta["format"] != FORMAT:
            raise DamagedCheckpoint(f"checkpoint {path}: format {meta['format']}, this version reads {FORMAT}")
        if not _is_complete(meta):
            raise DamagedCheckpoint(f"checkpoint {path}: {META} lacks what a checkpoint must say, or says it otherwise")
    except OSError as error:
        raise _reading_problem(path, META, error) from error
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {META} can't be read ({error})") from error
    return meta


def verify_checkpoint(path: Path) -> dict:
    """Check every file of a checkpoint folder against its digest and return its meta. Raises as `read_meta`."""
    meta = read_meta(path)
    for name, expected in meta["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise DamagedCheckpoint(
                    f"checkpoint {path}: {name} has {count(size, 'byte')} instead of {expected['size']}"
                )
            if _digest_file(path / name) != expected["xxh3_128"]:
                raise DamagedCheckpoint(f"checkpoint {path}: {name} has other bytes than were written")
        except OSError as error:
            raise _reading_problem(path, name, error) from error
    return meta


def find_newest_good(
    folder: Path, warn: Callable[[str], None], accept: Callable[[dict], bool] = lambda meta: True
) -> tuple[Path, dict] | None:
    """The newest checkpoint in `folder` that verifies and whose meta is accepted, with its meta; each damaged one is
    named by `warn`. Raises TransientError where none is left because the disk fails, and as `read_meta`."""
    failing: DamagedCheckpoint | None = None
    for _, path in list_checkpoints(folder):
        try:
            if accept(read_meta(path)):
                return path, verify_checkpoint(path)
        except DamagedCheckpoint as error:
            failing = error if error.may_pass else failing
            warn(f"{error}; using the one before it")
    if failing is not None:
        raise TransientError(f"{failing}, and no other is left; nothing was changed, try again")
    return None


def newest_meta(folder: Path) -> dict:
    """The manifest of the newest checkpoint in `folder` that has a sound one; empty without."""
    for _, path in list_checkpoints(folder):
        with contextlib.suppress(DamagedCheckpoint):
            return read_meta(path)
    return {}


def begun_from(folder: Path) -> list[str]:
    """The checkpoints that the run with the checkpoints in `folder` was told to start from; see `Start.begun_from`."""
    return list(newest_meta(folder).get("begun_from", []))
