"""Several runs of one stage at once: one writes, the others are refused with its name, and the result is whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import KILLED, Child, Pipeline, assert_recovered, committed, make_first
from processes import wait_for

from nestdiff_core.errors import LockHeld
from nestdiff_core.experiment import Ref
from nestdiff_core.stages.common import reuse


def is_stopped(child: Child) -> bool:
    return Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def stopped_at_work(pipeline: Pipeline, stage: str) -> Child:
    """A run that has taken the stage's lock and does nothing more until it is told to continue."""
    child = pipeline.start(stage)
    wait_for(lambda: any(lock.read_text() for lock in pipeline.home.glob(f"{stage}/*/.lock")))
    child.kill(signal.SIGSTOP)
    wait_for(lambda: is_stopped(child))
    return child


def test_the_second_is_refused_with_the_name_of_the_first(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """Two processes encode the same shards: exit code 5 says who has them, and the first ends as if it were alone."""
    make_first(pipeline, undisturbed, "features")
    first = stopped_at_work(pipeline, "features")
    kept = committed(pipeline.home)
    second = pipeline.run("features")
    assert second.code == 5 and f"locked by pid {first.pid} on " in second.refusal["found"], second.said
    assert second.refusal["stage"] == "features"
    assert committed(pipeline.home) == kept
    first.kill(signal.SIGCONT)
    outcome = first.wait()
    assert outcome.code == 0, outcome.said
    kept = committed(pipeline.home)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)


def test_a_run_that_was_left_behind_is_not_written_over(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """One whose terminal has gone still has its lock: retries are refused until it is dead, then go on where it was."""
    make_first(pipeline, undisturbed, "latents")
    orphan = stopped_at_work(pipeline, "latents")
    for _ in range(2):
        assert pipeline.run("latents").code == 5
    orphan.kill()
    assert orphan.wait().code == KILLED
    kept = committed(pipeline.home)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)


def test_what_another_has_made_meanwhile_is_not_made_again(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """Between a look for an artifact and its lock another run may seal it: refused, and what it sealed stays."""
    x = pipeline.x
    assert reuse(x, Ref("images")) is None
    make_first(pipeline, undisturbed, "encoder")
    made = committed(pipeline.home)
    with pytest.raises(LockHeld, match="has just made images"), x.writing(Ref("images")):
        pass
    assert committed(pipeline.home) == made
    assert reuse(x, Ref("images")) is not None
    with pytest.raises(KeyboardInterrupt), x.writing(Ref("images")):  # on purpose it can be made again
        raise KeyboardInterrupt


def together(pipeline: Pipeline, undisturbed: Pipeline, number: int) -> None:
    """So many runs of everything started at once: each is done or refused, and one more finds all made."""
    outcomes = [child.wait() for child in [pipeline.start() for _ in range(number)]]
    assert {outcome.code for outcome in outcomes} <= {0, 5}, "\n".join(outcome.said for outcome in outcomes)
    refusals = [outcome.refusal for outcome in outcomes if outcome.code == 5]
    assert all("locked by" in str(r["found"]) or "has just made" in r["error"] for r in refusals), refusals
    assert any(outcome.code == 0 for outcome in outcomes)
    kept = committed(pipeline.home)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)


def test_two_at_once(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """From an empty artifact root."""
    together(pipeline, undisturbed, 2)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
def test_eight_at_once(pipeline: Pipeline, undisturbed: Pipeline, attempt: int) -> None:
    """The same with eight."""
    together(pipeline, undisturbed, 8)
