"""The end of a run on several ranks: nobody leaves before rank 0 has written what it alone writes."""

import pytest
import runs

from pipeline.dataset.index.scan import build_index


@pytest.mark.slow
def test_a_finished_run_does_not_end_as_failed_while_rank_0_writes_its_report(synthetic_root, tmp_path):
    build_index(synthetic_root)
    program = ["-m", "tests.nccl_rule", "9"]
    options = ["--train.max_steps", "2", "--tracking.report", "true"]
    output = runs.train(synthetic_root, tmp_path / "run", *options, processes=2, program=program)
    assert "counts as hung" not in output and (tmp_path / "run/finished").exists()
