"""Progress: a log gets a line now and then, with the numbers measured last, and one at the end of each piece."""

import pytest

from nestdiff_core.progress import LogProgress, NumbersProgress, TerminalProgress, all_of


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


def test_a_bar_does_not_take_what_was_there_for_this_runs_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Training that goes on from step 9,000 knows neither its rate nor the time that is left, yet."""
    with TerminalProgress() as progress:
        progress(9_000, 10_000, "level 1")
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert "9000/10000" in last and "?it/s" in last


def test_plots_get_some_hundred_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day with a line each second: first and last are told, those between ever more rarely; a rare number is
    repeated until there is a newer one."""
    now = 1000.0
    monkeypatch.setattr("nestdiff_core.progress.time.monotonic", lambda: now)
    told: list[dict[str, float]] = []
    progress, total = all_of(NumbersProgress(told.append, interval_seconds=10.0, share=0.01)), 24 * 3600
    for step in range(1, total + 1):
        now += 1.0
        progress(step, total, "a", loss=1 / step, **({"held_out": float(step)} if step in (5, 1000) else {}))
    assert told[0] == {"step": 1, "loss": 1.0} and told[-1]["step"] == total
    assert 500 < len(told) < 600
    assert [point["held_out"] for point in told if 1 < point["step"] < 1000] == [5.0] * 99
    assert told[1]["step"] - told[0]["step"] == 10 and told[-2]["step"] - told[-3]["step"] > 700


def test_parts_of_a_number_are_plotted_and_not_in_the_line() -> None:
    """Four quarters of a loss: a log says the loss, plots get all five numbers."""
    lines: list[str] = []
    told: list[dict[str, float]] = []
    progress = all_of(LogProgress(lines.append, interval_seconds=0.0), NumbersProgress(told.append))
    numbers = {"loss": 0.5, **{f"loss_t{quarter / 4:.2f}": float(quarter) for quarter in range(4)}}
    progress(1, 1, "a", **numbers)
    assert lines == ["a: 1 of 1, loss 0.5"] and told == [{"step": 1, **numbers}]
