"""The paper's rows: all there, consistent, and of the sizes and costs that the paper prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nestdiff_core.config import UViTConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.models import LatentTokens, NestedDenoiser, count_parameters
from nestdiff_core.recipes import RECIPES
from nestdiff_core.recipes import paper as rows
from nestdiff_core.tables import level_table, paper_table, total_row

NAMES = [
    *(f"iclr_coco_l{n}" for n in range(1, 6)),
    *(f"iclr_coco_text_l{n}" for n in range(1, 4)),
    *(f"iclr_imagenet100_l{n}" for n in range(1, 5)),
    *(f"iclr_imagenet100_class_l{n}" for n in range(1, 4)),
    *(f"iclr_imagenet1k_class_l{n}" for n in range(1, 3)),
    *(f"cvpr_imagenet{kind}_l{n}" for kind in ("", "_class") for n in ("1", "1_star", "2", "3", "4", "5")),
    *(f"cvpr_coco_text_l{n}" for n in range(1, 4)),
]


def test_every_row_has_a_recipe() -> None:
    """All rows of the tables, the controls, and a printed number for each."""
    controls = {name for name in rows.RECIPES if name not in NAMES}
    assert set(NAMES) <= set(rows.RECIPES)
    assert {name.rsplit("_", 1)[-1] for name in controls} == {"l3", "l2", "mae", "moco", "clip", "dino", "none"}
    assert all(rows.PRINTED[name].fid is not None for name in rows.RECIPES)
    assert all(RECIPES[name]().name == name for name in rows.RECIPES)


@pytest.mark.parametrize(
    ("config", "kind", "printed"),
    [
        (rows.UVIT_S, {}, 44_259_492),
        (rows.UVIT_S, {"text": (77, 768)}, "44.69M"),
        (rows.UVIT_S_DEEP, {"text": (77, 768)}, "58.35M"),
        (rows.UVIT_M, {}, 130_122_404),
        (rows.UVIT_M, {"num_classes": 1000}, 130_891_940),
        (rows.UVIT_MID, {}, "99.42M"),
        (rows.UVIT_L, {"num_classes": 1000}, "286.8M"),
        (rows.UVIT_H, {"num_classes": 1000}, "500.8M"),
    ],
)
def test_sizes_are_the_published_ones(config: UViTConfig, kind: dict, printed: int | str) -> None:
    """Parameters on 32x32x4 with patch 2 (the table of the paper's section on U-ViT)."""
    with torch.device("meta"):
        model = NestedDenoiser(1, LatentTokens((4, 32, 32), 2), {}, config, **kind)
    found = count_parameters(model)
    decimals = len(printed.split(".")[1]) - 1 if isinstance(printed, str) else 0
    assert found == printed or f"{found / 1e6:.{decimals}f}M" == printed


def test_cvpr_totals_are_the_printed_ones() -> None:
    """26.8, 35.1 and 34.0 GFlops for one level, one deeper network, and five levels."""
    for name, printed in {"cvpr_imagenet_l1": 26.8, "cvpr_imagenet_l1_star": 35.1, "cvpr_imagenet_l5": 34.0}.items():
        (row,) = paper_table(RECIPES[name]())
        assert (row["printed"], row["counted"], row["reproduced"]) == (printed, printed, "yes")


def test_iclr_growth_is_the_counted_one() -> None:
    """Counted independently of this code: parameters (millions) and GFlops that each level of COCO adds."""
    counted = {1: (44.13, 22.65), 2: (58.19, 8.53), 3: (59.59, 1.41), 4: (59.51, 0.74), 5: (59.31, 0.59)}
    for depth, expected in counted.items():
        found = {row["paper"]: row for row in paper_table(RECIPES[f"iclr_coco_l{depth}"]())}
        assert tuple(row["counted"] for row in found.values()) == expected
    assert found["GFlops added"]["reproduced"] == "no"  # 0.71 is printed


@pytest.mark.parametrize("kind", ["", "_class"])
def test_cvpr_deepening_reuses_trained_levels(kind: str) -> None:
    """A level inserted at 2 leaves every denoiser above it as it was; z_1's and z_2's are new."""
    for depth in range(2, 5):
        shallow, deep = (Experiment(RECIPES[f"cvpr_imagenet{kind}_l{n}"]()) for n in (depth, depth + 1))
        for level in range(2, depth + 1):
            assert shallow.config_hash(Ref("denoiser", level)) == deep.config_hash(Ref("denoiser", level + 1))
        for level in (1, 2):
            hashes = {x.config_hash(Ref("denoiser", level)) for x in (shallow, deep)}
            assert len(hashes) == 2


def test_iclr_deepening_reuses_all_but_the_level_below() -> None:
    """A new top level retrains D_{L-1}, which becomes conditional, and leaves those below."""
    shallow, deep = (Experiment(RECIPES[f"iclr_coco_l{n}"]()) for n in (4, 5))
    same = [shallow.config_hash(Ref("denoiser", n)) == deep.config_hash(Ref("denoiser", n)) for n in range(1, 5)]
    assert same == [True, True, True, False]


def test_tokens_of_the_cvpr_hierarchy() -> None:
    """16, 4, 4 and 1 tokens of z_2 to z_5: patches of 2 from a grid of 4 on."""
    levels = level_table(Experiment(RECIPES["cvpr_imagenet_l5"]()))
    own = {row["level"]: row["tokens"] - row["condition tokens"] - 1 for row in levels}
    assert own == {5: 1, 4: 4, 3: 4, 2: 16, 1: 256}
    assert total_row(levels)["MACs"] == sum(row["MACs"] for row in levels)


def test_inspect_prints_valid_json() -> None:
    """A recipe without noise has infinite information, which strict JSON cannot say."""
    said = subprocess.run(
        [sys.executable, "-m", "nestdiff_core", "inspect", "iclr_coco_l5", "--json"], capture_output=True, check=True
    ).stdout
    record = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["levels"][0]["nats"] is None and len(record["paper"]) == 2
