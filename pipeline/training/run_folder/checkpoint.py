"""Checkpoints: a folder `step-000012345/` of plain state_dicts, each file digested, written whole or not at all.

A folder is written under a temporary name, every file and the folder fsynced, and renamed. `manifest.py` says what
`meta.json` holds, and verifies the rest by it. Loading never unpickles (`weights_only=True`).
"""

import errno
import functools
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from pipeline.errors import TransientError, UserError
from pipeline.files import FREE, reason_of
from pipeline.run_paths import META, checkpoint_name, list_checkpoints
from pipeline.training.run_folder.manifest import FORMAT, seal
from pipeline.training.run_folder.snapshot import Snapshot

_LEFTOVER = re.compile(r"\.step-\d{9,}\.(\d+|old)\.tmp")  # of starts that were killed


class _DigestingFile:
    """A binary file that digests what passes through `write`."""

    def __init__(self, file: BinaryIO):
        self.file, self.state, self.size = file, xxhash.xxh3_128(), 0
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.state.update(view)
        self.size += view.nbytes
        try:
            return self.file.write(view)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that sync no folders, as VirtualBox's shared ones
            raise
    finally:
        os.close(descriptor)


def _write_file(path: Path, write: Callable[[Any], None]) -> dict:
    with path.open("wb") as file:
        digesting = _DigestingFile(file)
        try:
            write(digesting)
        except RuntimeError:
            if digesting.refusal is not None:  # torch.save hides what the disk said
                raise digesting.refusal from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return {"size": digesting.size, "xxh3_128": digesting.state.hexdigest()}


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], meta: dict) -> Path:
    """Write `state` (name -> state_dict, on the CPU) and `meta` to `folder/step-.../` and return its path.

    Raises OSError where the disk refuses; then nothing that was there before has changed.
    """
    final = folder / checkpoint_name(step)
    temporary = folder / f".{checkpoint_name(step)}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for name, value in state.items():
            files[f"{name}.pt"] = _write_file(temporary / f"{name}.pt", functools.partial(torch.save, value))
        sealed = seal({**meta, "format": FORMAT, "step": step, "files": files})
        _write_file(temporary / META, lambda file: file.write(sealed))
        _sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_state(path: Path, names: Iterable[str] = ("model", "optimizer")) -> dict[str, Any]:
    """The state_dicts of a verified checkpoint folder, on the CPU. Never unpickles."""
    state = {}
    for name in names:
        try:
            state[name] = torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise TransientError(f"checkpoint {path}: {name}.pt can't be loaded ({reason})") from error
    return state


class CheckpointWriter:
    """Writes snapshots behind the training and prunes old checkpoints (rank 0 only).

    One snapshot is written at a time; a second `save` waits for the first, so a slow disk slows training instead of
    filling memory. `before` is called ahead of each, by the thread that writes.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        protected: Callable[[], set[int]],
        warn: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
    ):
        self.before = before
        self.folder, self.keep, self.protected, self.warn = folder, keep, protected, warn
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self.refusal = ""  # why the last one could not be written, and what to do
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*.tmp"):
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot; waits for the one before it."""
        self.wait()
        self._writing = self._pool.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> str | None:
        self.before()
        snapshot.wait()
        write_checkpoint(self.folder, snapshot.step, snapshot.state, snapshot.meta)
        return self.prune()

    def prune(self) -> str | None:
        """Remove all but the newest `keep` and the protected ones. Returns, in words, what can't be removed: it stays,
        and what was saved is on the disk all the same."""
        try:
            safe = self.protected()
        except (TransientError, UserError) as error:
            return f"no old checkpoint is removed: {error}"
        refused: list[str] = []
        for step, path in list_checkpoints(self.folder)[self.keep :]:
            try:
                if step not in safe:
                    self._remove(path)
            except OSError as error:
                refused.append(f"{path} ({error.strerror})")
        return f"old checkpoints can't be removed, and take up space: {', '.join(refused)}" if refused else None

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run went back."""
        for later, path in list_checkpoints(self.folder):
            if later > step:
                self._remove(path)

    @staticmethod
    def _remove(path: Path) -> None:
        doomed = path.with_name(f".{path.name}.old.tmp")
        try:
            path.rename(doomed)
        except OSError as error:
            if error.errno != errno.EXDEV:  # an overlay can't rename a folder of the container's image
                raise
            (path / META).unlink(missing_ok=True)
            doomed = path
        shutil.rmtree(doomed, ignore_errors=True)

    def wait(self) -> bool:
        """Wait until the last snapshot is on the disk. False, and a warning, if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        try:
            left = writing.result()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.refusal = f"({reason_of(error, self.folder)}); {f'{FREE} and ' if full else ''}start again"
            self.warn(
                f"the checkpoint could not be written to {self.folder} ({error}); training continues, "
                "and the next save tries again"
            )
            return False
        if left:
            self.warn(left)
        return True

    def close(self) -> bool:
        good = self.wait()
        self._pool.shutdown()
        return good
