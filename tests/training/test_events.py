"""Event files for TensorBoard."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from nestdiff_core.training.events import EventFiles


def test_resumes_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is shown once, also where a notebook goes on so soon that file names tell no order: 9, 10, 11."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for after, steps in ((0, (5, 10, 15)), (12, (15, 20, 25)), (22, (25, 30))):
        with EventFiles(tmp_path, level=2, after=after) as log:
            for step in steps:
                log({"step": step, "loss": after + step})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    seen = [(s.step, s.value) for s in events.Scalars("level_2/loss")]
    assert seen == [(5, 5), (10, 10), (15, 27), (20, 32), (25, 47), (30, 52)]
