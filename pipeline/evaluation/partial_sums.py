"""Partial sums of an evaluation, kept in the run folder: one that was stopped or killed resumes, to the same scores.

A file a rank, in `RUN/evaluation/KEY/`. KEY is a digest of all that the sums depend on, so sums of another checkpoint,
size, number of ranks or version of the programs are never taken. Ranks keep theirs when they like: no rank needs
another's. Those that nobody has written to for days are removed.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.files import atomic_write, reason_of
from pipeline.logs import logger
from pipeline.training.ranks.consistency import code_digest
from pipeline.training.ranks.world import World

KEEP_S = 10.0  # between two writings
LEFT_S = 7 * 86400.0  # without a writing: nobody resumes that evaluation
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda")  # how their distributions' names begin


def program_versions() -> dict[str, str]:
    """Version of each installed program that has a part in scores, by name; of this package, the digest of its code."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    found = {name: version for name, version in installed.items() if name.startswith(_LIBRARIES)}
    return dict(sorted(found.items())) | {"pipeline": code_digest()}


class PartialSums:
    """The sums of one network at one size, of this rank.

    Args:
        folder: RUN/evaluation.
        facts: all that the sums depend on, but for the number of ranks; JSON.
        world: this rank among the others.
        name: of what is scored, for messages.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], world: World, name: str):
        text = json.dumps({**facts, "world_size": world.size}, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = self.folder / f"rank-{world.rank:05d}.npz"
        self.seconds = 0.0  # that an evaluation took in all, this start's part included
        self._world, self._name = world, name
        self._began = self._kept = time.monotonic()
        self._before = 0.0
        self._warned = False

    def restore(self, sums: Mapping[str, torch.Tensor]) -> tuple[int, dict[int, str]]:
        """Fill `sums` with what was kept. Returns the batches that are in them, and the images that could not be read
        (sample id -> reason); 0 and none where nothing was kept."""
        self._began = self._kept = time.monotonic()
        try:
            with np.load(self.path) as kept:
                arrays = {name: kept[name] for name in sums}
                facts = json.loads(bytes(kept["facts"]))
                done, unreadable = facts["done"], {int(key): why for key, why in facts["unreadable"].items()}
            if any(arrays[name].shape != tuple(sums[name].shape) for name in sums):
                raise ValueError("other sums")
        except FileNotFoundError:
            return 0, {}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logger.warning("%s is damaged: this rank scores its images again", self.path)
            return 0, {}
        for name, values in arrays.items():
            sums[name].copy_(torch.from_numpy(values))
        self._before = self.seconds = facts["seconds"]
        if done and self._world.is_rank_zero:
            logger.info(f"{self._name}: {done:,} batches were scored before; the others follow")
        return done, unreadable

    def is_due(self) -> bool:
        """Were the sums last kept some time ago?"""
        return time.monotonic() - self._kept > KEEP_S

    def keep(self, done: int, sums: Mapping[str, torch.Tensor], unreadable: Mapping[int, str]) -> None:
        """Write the sums of the first `done` batches. Where that can't be, one line says so, and the
        evaluation goes on."""
        self._kept = time.monotonic()
        self.seconds = self._before + self._kept - self._began
        facts = {"done": done, "unreadable": dict(unreadable), "seconds": self.seconds}
        arrays: dict[str, Any] = {name: values.cpu().numpy() for name, values in sums.items()}
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        written = io.BytesIO()
        np.savez(written, **arrays)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, written.getvalue())
        except OSError as error:
            if not self._warned and self._world.is_rank_zero:
                why = reason_of(error, self.path)
                logger.warning("%s can't be written (%s): if stopped, this evaluation starts again", self.path, why)
            self._warned = True

    def remove(self) -> None:
        """The scores are out. With these sums go those of evaluations that nobody has resumed for long."""
        shutil.rmtree(self.folder, ignore_errors=True)
        others: list[Path] = []
        with contextlib.suppress(OSError):
            others = [path for path in self.folder.parent.iterdir() if path.is_dir() and not path.is_symlink()]
        for other in others:
            with contextlib.suppress(OSError):
                written = max(file.stat().st_mtime for file in (other, *other.iterdir()))
                if time.time() - written > LEFT_S:
                    shutil.rmtree(other, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # unless another evaluation is at work
