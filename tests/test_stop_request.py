"""A request to stop that comes before the training is there to hear it is heard; one of an earlier start is not."""

import pytest

from pipeline.training.run import RunFolder


@pytest.mark.parametrize(
    "text, restart, stays",
    [
        ("7.0 USR1 from Slurm", None, True),
        ("7.1 USR1 from Slurm", "1", True),
        ("7.0 USR1 from Slurm", "1", False),  # of the attempt before
        ("6.0 USR1 from Slurm", None, False),  # of another job
        ("enough", None, False),
        ("", None, False),
    ],
)
def test_stop_file_at_the_start(tmp_path, monkeypatch, text, restart, stays):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restart is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    folder = RunFolder(tmp_path)
    folder.stop.write_text(text)
    (tmp_path / "interrupted").write_text("{}")
    folder.clear_marks()
    assert folder.stop.exists() == stays
    assert not (tmp_path / "interrupted").exists()
