"""What importing a part of the project may drag in. `make check` holds the direction of imports (pyproject.toml,
importlinter); what is loaded at once rather than when it is needed shows only at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module",
    ["nestdiff_core", "nestdiff_core.config", "nestdiff_core.recipes", "nestdiff_core.experiment", "nestdiff_core.cli"],
)
def test_light_module_loads_neither_torch_nor_dagster(module: str) -> None:
    """What `--help`, a wrong argument and Dagster's definitions need is there without the seconds that torch costs."""
    assert loaded(module, {"torch", "dagster", "timm", "open_clip", "sklearn"}) == []


def test_a_worker_waits_for_no_library_that_it_does_not_use() -> None:
    """Each process of a training imports the stages. torchvision, with the compiler that it loads, takes as long as
    torch itself."""
    unused = {"dagster", "timm", "open_clip", "torchvision", "torch_fidelity", "torch._dynamo", "sklearn", "scipy"}
    assert loaded("nestdiff_core.stages", unused) == []


def loaded(module: str, watched: set[str]) -> list[str]:
    """Which of these there are after an import of `module`."""
    command = f"import sys, {module}; print(*{watched} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.split()


def test_asset_and_pipeline_modules_keep_live_annotations() -> None:
    """Dagster reads annotations of `context` and `Config` as objects; the __future__ import makes strings of them."""
    for path in sorted([*(ROOT / "assets").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        imports = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert "__future__" not in imports, path
