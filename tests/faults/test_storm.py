"""The fault storm (`make storm`): kill -9 at random times, over and over, never changes what comes out."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import REPOSITORY

from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import toy

ROUNDS = int(os.environ.get("NESTDIFF_STORM_ROUNDS", "10"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kills_at_random_times(toy_run: Any, tmp_path: Path, seed: int) -> None:
    """The whole toy experiment, killed after 1 to 25 seconds until it ends by itself: same digests, no litter."""
    rng, kills = random.Random(seed), 0
    while True:
        run = subprocess.Popen(
            [sys.executable, "-m", "nestdiff_core", "run", "toy"],
            cwd=REPOSITORY,
            env={**os.environ, "NESTDIFF_HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            errors = run.communicate(timeout=rng.uniform(1, 25) if kills < 8 else 300)[1]
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            kills += 1
            continue
        if run.returncode == 5 and "locked by" in errors:  # the trainer of a killed run is still saving
            time.sleep(1)
            continue
        assert run.returncode == 0, errors
        break
    print(f"{kills} kills")
    assert kills > 0
    assert experiment_digests(Experiment(toy(), tmp_path)) == experiment_digests(Experiment(toy(), toy_run.root))
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp-") or p.name.endswith(".partial")]
