"""Progress: a log gets a line now and then, with the numbers measured last, and one at the end of each piece."""

from nestdiff_core.progress import LogProgress


def test_a_log_gets_the_latest_numbers() -> None:
    """Calls without numbers keep those before; another piece of work starts without them."""
    lines: list[str] = []
    progress = LogProgress(lines.append, interval_seconds=0.0)
    progress(1, 3, "a", loss=0.5)
    progress(2, 3, "a")
    progress(3, 3, "a", loss=0.25)
    progress(1, 1, "b")
    assert lines == ["a: 1 of 3, loss 0.5", "a: 2 of 3, loss 0.5", "a: 3 of 3, loss 0.25", "b: 1 of 1"]


def test_a_log_is_not_flooded() -> None:
    """Within the interval only the last step of each piece of work is told."""
    lines: list[str] = []
    progress = LogProgress(lines.append, interval_seconds=3600.0)
    for what in ("a", "b"):
        for done in range(1, 1001):
            progress(done, 1000, what)
    assert lines == ["a: 1,000 of 1,000", "b: 1,000 of 1,000"]
