"""The ledger: every step once, whatever was cut off."""

import json
import math

import pytest

from pipeline.tracking.eval_rows import best_step
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.ledger_rows import last_steps, read_rows, read_rows_backwards


def write(path, steps, tail=b""):
    rows = [{"kind": "event", "event": "started", "step": 0}]
    rows += [{"kind": "train", "step": step, "loss": 1.0} for step in steps]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + tail)


def steps(path):
    return [row["step"] for row in read_rows(path) if row["kind"] == "train"]


def test_rows_after_the_resumed_step_are_taken_out_and_events_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    assert last_steps(path) == {"train": 10}
    ledger = Ledger(path, step=6)
    for step in (7, 8):
        ledger.append({"kind": "train", "step": step, "loss": 0.5})
    ledger.close()
    assert steps(path) == list(range(1, 9))
    assert [row["event"] for row in read_rows(path) if row["kind"] == "event"] == ["started"]


@pytest.mark.parametrize(
    "tail", [b'{"kind": "train", "step": 4, "lo', b'{"kind"', b"\x00\x00\x00", b"[]\n", b"nonsense\n"]
)
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3], tail)
    assert steps(path) == [1, 2, 3]
    for block in (1, 7, 60, 1 << 16):
        assert list(read_rows_backwards(path, block)) == list(read_rows(path))[::-1]
    ledger = Ledger(path, step=3)
    ledger.append({"kind": "train", "step": 4, "loss": 1.0})
    ledger.close()
    assert steps(path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines() if line.startswith("{"))


def test_an_evaluation_of_the_resumed_step_stays_and_later_ones_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9))
    ledger = Ledger(path, step=8)
    for step, top1 in ((4, 50.0), (8, 60.0)):
        ledger.append({"kind": "eval", "step": step, "val_top1": top1})
    assert best_step(ledger.evaluations) == 8
    ledger.close()
    assert [row["step"] for row in Ledger(path, step=8).evaluations] == [4, 8]
    assert [row["step"] for row in Ledger(path, step=5).evaluations] == [4]


def test_where_no_file_is_there_are_no_rows(tmp_path):
    for path in (tmp_path, tmp_path / "metrics.jsonl"):
        assert [*read_rows(path), *read_rows_backwards(path)] == []


def test_best_is_the_earliest_of_equals():
    assert best_step([]) is None
    assert best_step([{"step": step, "val_top1": top1} for step, top1 in ((1, 5.0), (2, 7.0), (3, 7.0))]) == 2


def test_rows_are_json_even_when_numbers_are_not(tmp_path):
    ledger = Ledger(tmp_path / "metrics.jsonl", step=0)
    ledger.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    ledger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "kind": "train",
        "step": 1,
        "loss": "nan",
        "grad_norm": "inf",
    }
