"""Compiled denoisers: whole, once for each shape of batch, and the same images.

In processes of their own: the runtime type checks of the tests cannot be compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

EVERY_NETWORK = """
import itertools, torch
from nestdiff_core.config import UViTConfig
from nestdiff_core.models.nested import LatentTokens, NestedDenoiser

shape = UViTConfig(width=16, depth=2, num_heads=2)
above = {3: LatentTokens((5, 1, 1), 1), 2: LatentTokens((3, 2, 2), 1)}
latent = LatentTokens((1, 8, 8), 2)
for injection, kind in itertools.product(("tokens", "fusion"), ("none", "class", "text")):
    told = {"none": {}, "class": {"num_classes": 4}, "text": {"text": (3, 6)}}[kind]
    model = NestedDenoiser(1, latent, above, shape, injection=injection, **told).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    *inputs, drop = model.example_inputs(4, "cpu")
    whole = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="eager")
    some = torch.arange(4) > 1
    for asked in (None, some, {"labels": ~some, 2: some, 3: some}):
        with torch.no_grad():
            torch.testing.assert_close(whole(*inputs, asked), model(*inputs, asked), rtol=0, atol=0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            whole(*inputs, asked)
    torch._dynamo.reset()
"""

SAMPLED = """
import sys, json, dataclasses, numpy as np, torch
from torch._dynamo.utils import counters
from nestdiff_core.experiment import Experiment
from nestdiff_core.loading import Cascade
from nestdiff_core.recipes import toy
from pathlib import Path

base = toy()
base = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, num_evaluations=4, batch_size=8))
compiled = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, compile=True))
found, graphs = {}, []
for name, config in (("eager", base), ("compiled", compiled)):
    cascade = Cascade(Experiment(config, Path(sys.argv[1])))
    for indices in (range(8), range(20)):
        found[name] = cascade.latents(indices, seed=0), cascade.without_conditions(indices, seed=0)
        graphs.append(counters["stats"]["unique_graphs"])
difference = max(float((a - b).abs().max()) for a, b in zip(
    (*found["eager"][0].values(), found["eager"][1]), (*found["compiled"][0].values(), found["compiled"][1])))
print(json.dumps({"graphs": graphs, "breaks": sum(counters["graph_break"].values()), "difference": difference}))
"""


def alone(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True, stdout=-1, text=True
    ).stdout


def test_no_denoiser_breaks_the_graph() -> None:
    """Tokens and fusion, without labels, with classes, with captions; nothing, all or some conditions dropped; in
    float32 and in mixed precision: one graph each, and the same numbers."""
    alone(EVERY_NETWORK)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++")
def test_a_compiled_cascade_samples_the_same(toy_run: Any) -> None:
    """Two levels and level 1 alone: three graphs, at the first call; none at later calls or for more images; latents of
    size 1 differ by rounding."""
    seen = json.loads(alone(SAMPLED, toy_run.root).splitlines()[-1])
    assert seen["graphs"] == [0, 0, 3, 3] and seen["breaks"] == 0
    assert 0 < seen["difference"] < 1e-4
