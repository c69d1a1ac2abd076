"""What it costs to launch a training job: in this process, under torchrun by hand, through Dagster and Pipes.

Seconds by the clock, as most of them are waited for; on a busy machine they say little.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from nestdiff_core import stages
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy
from scripts.bench.measure import table

LEVEL, ROUNDS = 2, 3


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, home = Path(folder) / "artifacts", Path(folder) / "dagster"
        home.mkdir()
        shutil.copy("pipelines/dagster.yaml", home)
        x = Experiment(toy(), root)
        for make in (stages.images, stages.encoder, stages.features, stages.bases, stages.latents):
            make(x)
        own = {"NESTDIFF_HOME": str(root), "DAGSTER_HOME": str(home), "NESTDIFF_EXPERIMENT": "toy"}
        by_hand = [sys.executable, "-m", "nestdiff_core", "train", "toy", f"--level={LEVEL}"]
        dagster = ["dagster", "job", "execute", "-m", "pipelines.definitions", "-j", f"train_level_{LEVEL}"]
        calls: dict[str, Callable[[], object]] = {
            "a function call in a process that runs": lambda: stages.train(x, LEVEL),
            "python -m nestdiff_core train (torchrun)": lambda: subprocess.run(
                by_hand, env={**os.environ, **own}, check=True, capture_output=True
            ),
            f"dagster job execute -j train_level_{LEVEL} (Pipes, torchrun)": lambda: subprocess.run(
                dagster, env={**os.environ, **own}, check=True, capture_output=True
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for counted in range(-1, ROUNDS):
            for name, call in calls.items():
                shutil.rmtree(root / "denoiser", ignore_errors=True)
                start = time.monotonic()
                call()
                if counted >= 0:
                    seconds[name].append(time.monotonic() - start)
                x.artifact(Ref("denoiser", LEVEL))
        first = median(next(iter(seconds.values())))
        rows = [[name, f"{median(times):.1f}", f"{median(times) - first:.1f}"] for name, times in seconds.items()]
        table(f"Training the toy's level {LEVEL}, {toy().level(LEVEL).train.num_steps} steps", ["", "s", "more"], rows)
