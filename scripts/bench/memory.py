"""Peak memory of each stage's own process, at two numbers of images: it should not grow."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image
from webdataset.writer import TarWriter

from scripts.bench.measure import pictures, table

SMALL, LARGE, SIDE, SHARD_IMAGES = 2_000, 16_000, 32, 256
STAGES = ("images", "encoder", "features", "bases", "latents")

# A process starts with the peak of the one that it was forked from, which therefore has to be a small one.
_PEAK = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
print("peak", usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run() -> None:
    rows = []
    for source, stages in (("folder", STAGES[:1]), ("webdataset", STAGES)):
        peaks = [_peaks(source, stages, n) for n in (SMALL, SMALL, LARGE)]
        for stage in stages:
            small, again, large = (peak[stage] for peak in peaks)
            figures = [f"{size / 2**20:.0f}" for size in (small, again, large)]
            growth = (large - max(small, again)) / (LARGE - SMALL)
            rows.append([f"{stage}, {source}" if stage == "images" else stage, *figures, f"{growth:.0f}"])
    table(
        f"Peak resident memory, MiB: {SIDE}-pixel images, {SHARD_IMAGES} a shard, two levels",
        ["stage", f"{SMALL:,}", f"{SMALL:,}, again", f"{LARGE:,}", "growth, bytes an image"],
        rows,
    )


def _peaks(source: str, stages: Sequence[str], n: int) -> dict[str, int]:
    """Bytes for each stage, run through the command line one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        _write(folder / "images", source, n)
        experiment = {
            "recipe": "toy",
            "images": {"source": source, "path": "images", "resolution": SIDE, "channels": 3, "labels": False,
                       "images_per_shard": SHARD_IMAGES},
            "encoder": {"input_size": SIDE, "vit": {"patch_size": 4, "width": 64}},
            "conditioning": {"labels": "none"},
            "evaluation": {"probe": False},
        }  # fmt: skip
        (folder / "bench.yaml").write_text(yaml.safe_dump(experiment))
        return {stage: _peak(stage, folder) for stage in stages}


def _peak(stage: str, folder: Path) -> int:
    command = ["-m", "nestdiff_core", "run", str(folder / "bench.yaml"), "--stage", stage, "--device", "cpu"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "NESTDIFF_HOME": str(folder / "artifacts"), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", _PEAK, *command], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{stage} failed:\n{done.stderr}")
    return 1024 * int(done.stdout.rsplit("peak ", 1)[1])


def _write(folder: Path, source: str, n: int) -> None:
    for start in range(0, n, SHARD_IMAGES):
        files = {}
        for number, picture in enumerate(pictures(min(SHARD_IMAGES, n - start), SIDE, seed=start), start):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="PNG")
            files[f"{number:06d}"] = buffer.getvalue()
        if source == "folder":
            for key, data in files.items():
                (folder / f"{key}.png").write_bytes(data)
        else:
            with TarWriter(str(folder / f"{start:06d}.tar")) as tar:
                for key, data in files.items():
                    tar.write({"__key__": key, "png": data})
