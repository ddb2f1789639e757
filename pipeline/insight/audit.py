"""The verb `audit`: did a run train on the batches that its recipe, its seed and its data set say?

The ledger has a digest of every global batch: samples in order, crops, flips, and all that was drawn for it. A batch is
a function of recipe, seed and index alone, so its digest can be computed again: later, by another person, on another
machine, without a GPU and without reading an image. Several runs are compared with each other as well.
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from json import dumps
from pathlib import Path

import numpy as np

from pipeline.command import raising, run_command
from pipeline.config import Config, load_config, semantic_config
from pipeline.counts import count
from pipeline.dataset.index.index import Index, has_index, locate_index, open_sound
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.insight.runs import read_each
from pipeline.loader.plan import MOST_SUBSTITUTES, TrainPlan, make_train_plan
from pipeline.progress import Progress
from pipeline.run_paths import RunPaths, not_a_run_message
from pipeline.tracking.ledger_rows import TRAINING_UNREADABLE, is_start, lost_in_words, lost_steps, read_rows
from pipeline.training.guard import rollbacks_of_ledger
from pipeline.training.run_folder.manifest import newest_meta
from pipeline.training.run_folder.same_recipe import differing_settings

MOST_CHOSEN = 8  #: unreadable samples in a batch of which each choice is tried


@dataclass
class Audit:
    """What was found of one run.

    first, last: steps of the ledger. images: of all its batches. checked: batches computed again; replaced: those of
    them in which a substitute stands for an unreadable image. lost: (first, last) of each stretch of steps whose rows
    the ledger should have. settings_compared: was there a checkpoint to compare config.yaml with? problems: in words,
    none where all other rows are as they should be.
    """

    run: str
    first: int
    last: int
    images: int
    checked: int = 0
    replaced: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)
    settings_compared: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and not self.lost


def with_substitutes(
    plan: TrainPlan, planned: np.ndarray, unreadable: Collection[int], known: Collection[int]
) -> np.ndarray:
    """The planned ids, int64 [B], with a substitute of each that is among the unreadable ones: the first that is not
    known to be so, too."""
    ids = planned.copy()
    for i in np.flatnonzero(np.isin(planned, list(unreadable))):
        candidates = (plan.substitute(int(planned[i]), attempt) for attempt in range(MOST_SUBSTITUTES))
        ids[i] = next((found for found in candidates if found not in known), planned[i])
    return ids


def _choices(samples: Collection[int]) -> Iterable[Collection[int]]:
    """Which of these could not be read when their batch was made, as the others were read: all of them, or fewer. The
    ledger names samples for good, also those that a disk refused once, or in steps that were done again."""
    yield samples
    if len(samples) <= MOST_CHOSEN:
        yield from (some for number in range(len(samples) - 1, 0, -1) for some in combinations(samples, number))


def check_step(plan: TrainPlan, step: int, digest: str | None, unreadable: dict[int, int]) -> bool | None:
    """Is `digest` that of the batch of `step` (steps done)? None: it is, with substitutes for unreadable images.

    unreadable: sample id -> the step in which it was found so, which may be after it was read in good order.
    """
    planned, *_ = plan.samples_at(step - 1, 0, plan.global_batch_size)
    if plan.digest(step - 1, planned) == digest:
        return True
    here = unreadable.keys() & set(planned.tolist())
    until_here = [sample for sample, found in unreadable.items() if found <= step]
    for chosen in _choices(sorted(here)):
        for known in (unreadable, until_here):
            ids = with_substitutes(plan, planned, chosen, known)
            if not np.array_equal(ids, planned) and plan.digest(step - 1, ids) == digest:
                return None
    return False


def audit_run(
    folder: Path, index: Index, plan: TrainPlan, rows: list[dict], meta: dict, identity: dict, every: int
) -> Audit:
    """Compute every `every`-th batch of a run again. rows: of its ledger; meta: of its newest checkpoint, or empty;
    identity: its settings in config.yaml, as `semantic_config` gives them."""
    train = [row for row in rows if row.get("kind") == "train"]
    events = [row for row in rows if row.get("kind") == "event"]
    steps = [row["step"] for row in train]
    found = Audit(str(folder), steps[0], steps[-1], len(steps) * plan.global_batch_size)
    if steps != sorted(set(steps)):
        found.problems.append("the ledger's steps have repeats, or are not in order")
    found.lost = lost_steps(rows, max(steps[-1], meta.get("step", 0)))
    fingerprints = {row["index"] for row in events if is_start(row) and "index" in row}
    fingerprints |= {meta["index_fingerprint"]} if "index_fingerprint" in meta else set()
    for fingerprint in fingerprints - {index.fingerprint}:
        found.problems.append(f"the index {index.fingerprint} is not the run's ({fingerprint}); give its --data_root")
    if found.problems:
        return found
    found.settings_compared = "semantic_config" in meta
    saved, differing = differing_settings(meta.get("semantic_config", identity), identity)
    for name in differing:
        found.problems.append(
            f"{name} is {identity.get(name)} in config.yaml, and {saved.get(name)} in the checkpoints"
        )
    plan.reshuffle([rollback.to for rollback in rollbacks_of_ledger(events) if rollback.reshuffle])
    unreadable = dict(meta.get("blacklist", []))
    unreadable |= {row["sample"]: row["step"] for row in events if row.get("event") == TRAINING_UNREADABLE}
    others = []
    with Progress(folder.name, len(train[::every]), "batches") as progress:
        for row in train[::every]:
            same = check_step(plan, row["step"], row.get("batch_digest"), unreadable)
            found.checked += 1
            found.replaced += same is None
            others += [row["step"]] if same is False else []
            progress.advance()
    if others:
        found.problems.append(
            f"{len(others):,} of {found.checked:,} batches are others than recipe, seed and index say, "
            f"the first at step {others[0]:,}"
        )
    return found


def compare(one: Path, other: Path, rows: dict[Path, list[dict]]) -> tuple[str, bool]:
    """In words: did two runs see the same batches in the steps that both have? And: did none differ?"""
    digests = [
        {row["step"]: row.get("batch_digest") for row in rows[run] if row.get("kind") == "train"}
        for run in (one, other)
    ]
    common = sorted(digests[0].keys() & digests[1].keys())
    pair = f"{one.name} and {other.name}"
    if not common:
        return f"{pair}: no step in common", True
    differing = [step for step in common if digests[0][step] != digests[1][step]]
    where = f"steps {common[0]:,} to {common[-1]:,}"
    if not differing:
        return f"{pair}: the same batches, {where}", True
    return f"{pair}: {len(differing):,} of {len(common):,} batches differ, the first at step {differing[0]:,}", False


def _read(folder: Path) -> list[dict]:
    paths = RunPaths(folder)
    if not paths.config.exists():
        raise UserError(not_a_run_message(folder))
    rows = list(read_rows(paths.ledger))
    if not any(row.get("kind") == "train" for row in rows):
        raise UserError(f"{folder} has no training step in its ledger yet ({paths.ledger.name})")
    return rows


def in_words(found: Audit) -> Iterable[str]:
    """What was found of a run, in lines."""
    yield f"{found.run}: steps {found.first:,} to {found.last:,}, {count(found.images, 'image')}"
    if not found.problems:
        every = not found.lost and found.checked == found.last - found.first + 1
        part = "every batch" if every else count(found.checked, "batch")
        yield f"  {part}: as recipe, seed and index say (digests computed again)"
        if not found.settings_compared:
            yield "  no checkpoint is left, so settings that change no batch (loss, normalization) can't be compared"
    if found.replaced:
        yield f"  {found.replaced:,} of them with substitutes for unreadable images"
    if found.lost:
        yield (
            f"  WRONG: the ledger has no rows of {lost_in_words(found.lost)}, so nothing says what the run saw there; "
            "put them back from a copy of metrics.jsonl"
        )
    for problem in found.problems:
        yield f"  WRONG: {problem}"


def audit(
    runs: list[str],
    data_root: str | None = None,
    index: str | None = None,
    every: int = 1,
    json: str | None = None,
) -> int:
    """Compute the digest of every batch of a run again, and compare the batches of several runs.

    Needs the index of the run's data set, and no image. Exit code 0 where every batch is as recipe, seed and index say,
    and several runs saw the same batches in the steps that they have in common; else 2.

    Args:
        runs: run folders, or folders of runs; each is checked, and compared with the first one.
        data_root: the data set, where it has moved.
        index: the folder of its index; default: the run's, or DATA_ROOT/index.
        every: check each n-th batch only.
        json: also write what was found into this file.
    """
    if every < 1:
        raise UserError(f"--every {every}: give 1 or more")

    def read(folder: Path) -> tuple[dict, list[dict], Config]:
        meta = newest_meta(RunPaths(folder).checkpoints)  # before the rows, which a live run writes first
        with raising("train"):
            return meta, _read(folder), load_config(RunPaths(folder).config)

    of_runs = read_each(runs, read, "checked")
    rows = {folder: rows_of_run for folder, (_, rows_of_run, _) in of_runs.items()}
    folders = list(rows)
    found = []
    for folder in folders:
        meta, _, config = of_runs[folder]
        where = locate_index(config.data, data_root, index)
        if not has_index(where):
            raise UserError(
                f"the index of {folder.name}'s data set is not at {where}; give --data_root, where the data is now, or "
                "build it again with: pipeline index ROOT"
            )
        data_index = open_sound(where)
        plan = make_train_plan(data_index, config.data, config.train, config.augment)
        found.append(audit_run(folder, data_index, plan, rows[folder], meta, semantic_config(config), every))
        print("\n".join(in_words(found[-1])), flush=True)
    pairs = [compare(folders[0], other, rows) for other in folders[1:]]
    for line, _ in pairs:
        print(line)
    good = all(item.good for item in found) and all(same for _, same in pairs)
    if json:
        result = {"good": good, "runs": [asdict(item) for item in found], "compared": [line for line, _ in pairs]}
        Path(json).expanduser().write_text(dumps(result, indent=1) + "\n")
    return EXIT_OK if good else EXIT_USER


def main(argv: list[str]) -> int:
    return run_command(audit, "audit", argv)
