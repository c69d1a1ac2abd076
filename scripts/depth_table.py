"""What scripts/reproduce.py writes down of the rows that are done: numbers with metric cards, curves, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestdiff_core import loading
from nestdiff_core.evaluation.figures import loss_curve
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, write_bytes, write_json
from nestdiff_core.tables import format_table
from scripts.figures import side_by_side

DISTANCES = ("fd_classifier", "fd_moco", "fd_pixels")
NUMBERS = (*DISTANCES, "precision_classifier", "recall_classifier", "class_entropy_classifier")
OWN = ("code_version", "origin", "samples_digest")  # fields of a card in which the rows of one table may differ
QUARTERS = ("_t0.00", "_t0.25", "_t0.50", "_t0.75", "")
HISTORY = "history.json"
SHOWN = ("l1", "l1_autoguided", "l2_autoguided", "l3_autoguided"), ("l1", "l2", "l3")  # side by side, one or the other


@dataclass(frozen=True)
class Run:
    """One row of the table: an arm as it is sampled, of one seed."""

    arm: str
    seed: int
    x: Experiment

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def network(run: Run, level: int) -> tuple[str, int]:
    """Arms with the same networks share their name up to how they are sampled."""
    return run.arm.removesuffix("_contrast").removesuffix("_autoguided").removesuffix("_guided"), level


def row(run: Run) -> dict[str, Any]:
    """The numbers of one row, with the bootstrap errors of the distances and the metric cards."""
    x = run.x
    metrics, config = x.artifact(Ref("evaluation")).info["metrics"], loading.sampled_config(x)
    order = [level.level for level in reversed(config.levels) if config.can_be_guided(level.level)]
    passes = {
        m.level: config.num_evaluations(m.level) * (2 if m.guidance and config.can_be_guided(m.level) else 1)
        for m in config.levels
    }
    macs = sum(x.artifact(Ref("denoiser", level)).info["macs"] * count for level, count in passes.items())
    told = {"arm": run.arm, "seed": str(run.seed), "w": " ".join(f"{config.level(m).guidance:g}" for m in order) or "-"}
    numbers = {name: metrics[name]["value"] for name in NUMBERS}
    errors = {name: metrics[name]["deviation"] for name in DISTANCES}
    cards = {name: metrics[name]["card"] for name in NUMBERS}
    return {**told, "sampling_gmacs": macs / 1e9, **numbers, "errors": errors, "cards": cards}


def real(run: Run) -> dict[str, Any]:
    """As many training images in the place of samples (which the judges were trained on)."""
    metrics = run.x.artifact(Ref("evaluation")).info["metrics"]
    numbers = {name: metrics[name]["floor"] for name in NUMBERS}
    return {"arm": "training images", "seed": "", "w": "", "sampling_gmacs": None, **numbers, "errors": {}, "cards": {}}


def conditions(done: Sequence[Run]) -> list[dict[str, Any]]:
    """Held-out loss of each told level at the end of its training: the share that its condition takes off it, by
    quarter of t. A denoiser that two arms share is there once."""
    found: dict[str, dict[str, Any]] = {}
    for run in done:
        for level in run.x.config.levels:
            denoiser = run.x.artifact(Ref("denoiser", level.level))
            line = read_json(denoiser.path / HISTORY)[-1]
            if "held_out_loss_without_conditions" in line and denoiser.fingerprint not in found:
                lower = {
                    f"t{name.removeprefix('_t')}" if name else "all": 1
                    - line[f"held_out_loss{name}"] / line[f"held_out_loss_without_conditions{name}"]
                    for name in QUARTERS
                }
                found[denoiser.fingerprint] = {"arm": run.arm, "seed": str(run.seed), "level": level.level, **lower}
    return list(found.values())


def curves(done: Sequence[Run]) -> bytes:
    """PNG: held-out loss of each level 1 over the FLOPs of its training, of the first training seed; of a told one also
    with its condition withheld, which is what L = 1 has to do."""
    measured: dict[str, dict[float, float]] = {}
    seen = set()
    for run in (run for run in done if run.seed == done[0].seed):
        denoiser = run.x.artifact(Ref("denoiser", 1))
        if denoiser.fingerprint in seen:
            continue
        seen.add(denoiser.fingerprint)
        tflops = 6e-12 * denoiser.info["macs"] * run.x.config.level(1).train.batch_size
        arm, _ = network(run, 1)
        for line in read_json(denoiser.path / HISTORY):
            for name, key in ((arm, "held_out_loss"), (f"{arm}, told nothing", "held_out_loss_without_conditions")):
                if key in line:
                    measured.setdefault(name, {})[tflops * line["step"]] = line[key]
    spent = sorted({x for curve in measured.values() for x in curve})
    return loss_curve(
        spent,
        {name: [curve.get(x) for x in spent] for name, curve in measured.items()},
        title="Level 1, held-out images",
        xlabel="TFLOP of its training",
    )


def write(rows: Sequence[dict[str, Any]], told: Sequence[dict[str, Any]], panels: dict[str, Any], out: Path) -> None:
    """table.md, table.json and samples.png, of what there is so far."""
    shared, own = split_cards(rows)
    numbers = [{key: value for key, value in row.items() if key != "cards"} for row in rows]
    kept = [{**row, "card": card} for row, card in zip(numbers, own, strict=True)]
    write_json(out / "table.json", {"rows": kept, "cards": shared, "conditions": list(told)})
    text = [format_table([_with_errors(row) for row in numbers])]
    unlike = [
        {"arm": row["arm"], "seed": row["seed"], "differs in": " ".join(card["differs"])}
        for row, card in zip(rows, own, strict=True)
        if card["differs"]
    ]
    if unlike:
        text += ["Measured otherwise than the first row, so not to be compared with it:", format_table(unlike)]
    if told:
        text += ["Share of the held-out loss that the condition takes off it:", format_table(list(told))]
    (out / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    if panels:
        write_bytes(out / "samples.png", side_by_side(panels))
    print(text[0])


def split_cards(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the cards of a table say: of each number once, and of each row what is its own; `differs` lists the fields
    in which a row was measured otherwise than the first one that has cards, as NUMBER.FIELD."""
    shared: dict[str, Any] = {}
    own = []
    for row in rows:
        cards: dict[str, dict[str, Any]] = row["cards"]
        common = {name: {k: v for k, v in card.items() if k not in OWN} for name, card in cards.items()}
        shared = shared or common
        differs = [f"{n}.{k}" for n in common for k in shared[n] if common[n].get(k) != shared[n][k]]
        card = {k: v for k, v in cards[DISTANCES[0]].items() if k in OWN} if cards else {}
        own.append({**card, "differs": differs})
    return shared, own


def _with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """Its distances as value ± bootstrap error."""
    shown = {key: value for key, value in row.items() if key != "errors"}
    return shown | {name: f"{row[name]:.3f} ± {error:.3f}" for name, error in row["errors"].items()}


def pictures(done: Sequence[Run]) -> dict[str, Any]:
    """The same seeds side by side, of the first training seed: of the arms in SHOWN of which more are done."""
    first = {run.arm: run.x for run in done if run.seed == done[0].seed}
    shown = max(([arm for arm in arms if arm in first] for arms in SHOWN), key=len)
    return {arm: load_samples(first[arm].artifact(Ref("samples")).path / "samples.npz")[:36] for arm in shown}
