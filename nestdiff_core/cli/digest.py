"""Print what every stage of an experiment holds, as one sha256 each over the logical content.

Arrays are hashed as they are read with plain zarr, safetensors and numpy, so two runs that made the same thing have
the same digests wherever and however they ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nestdiff_core.artifacts import Artifact
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_experiment

    add_experiment(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    digests = experiment_digests(Experiment(load_experiment(arguments.experiment)))
    if arguments.json:
        print(json.dumps(digests, indent=1, sort_keys=True))
    else:
        for name, value in digests.items():
            print(f"{value or 'not made':<64}  {name}")
    return 0


def experiment_digests(x: Experiment) -> dict[str, str | None]:
    """sha256 of the logical content by stage; None where a stage has not been made."""
    digests: dict[str, str | None] = {}
    for ref in x.refs():
        artifact = x.find(ref)
        name = ref.stage if ref.level is None else f"{ref.stage}_level_{ref.level}"
        if ref.stage == "denoiser":
            digests |= _denoiser(name, artifact.path if artifact else None)
        else:
            digests[name] = _hash_content(ref, artifact) if artifact else None
    return digests


def _hash_content(ref: Ref, artifact: Artifact) -> str:
    path = artifact.path
    match ref.stage:
        case "images":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path / "index.parquet")
            return _hash_plain(table.to_pylist())
        case "features" | "crops" | "text" | "latents":
            return _hash_store(artifact)
        case "moments":
            import numpy as np

            with np.load(path / "moments.npz", allow_pickle=False) as arrays:
                return _hash_arrays((name, arrays[name]) for name in sorted(arrays.files))
        case "encoder":
            return _hash_tensors(path / "model.safetensors")
        case "svd_basis":
            return _hash_tensors(path / "basis.safetensors")
        case "reference":
            import numpy as np

            digests = {}
            for file in sorted(path.glob("*.npz")):
                with np.load(file, allow_pickle=False) as arrays:
                    digests[file.name] = _hash_arrays((name, arrays[name]) for name in sorted(arrays.files))
            return _hash_plain(digests)
        case "samples":
            import numpy as np

            with np.load(path / "samples.npz", allow_pickle=False) as arrays:
                return _hash_arrays((name, arrays[name]) for name in sorted(arrays.files))
        case "evaluation":
            record = json.loads((path / "metrics.json").read_text())
            return _hash_plain(
                {"metrics": {name: n["value"] for name, n in record["metrics"].items()}, "probe": record["probe"]}
            )
        case "ladder" | "sweep" | "neighbours":
            return _hash_plain(json.loads((path / f"{ref.stage}.json").read_text()))
        case "pictures":
            return artifact.digest
        case "report":  # of what: a stage's identity may hold last bits that its digest here leaves out
            return _hash_plain({part: found is not None for part, found in artifact.info["parts"].items()})
    raise AssertionError(f"no digest is defined for stage {ref.stage}")


def _hash_store(artifact: Artifact) -> str:
    """As `_hash_arrays` of all arrays of a store, a shard at a time."""
    import numpy as np
    import zarr

    group, total = zarr.open_group(artifact.path / "store.zarr", mode="r"), hashlib.sha256()
    for name in sorted(group.array_keys()):
        array: Any = group[name]
        total.update(_header(name, array))
        for shard in range(-(-array.shape[0] // array.shards[0])):
            file = f"store.zarr/{name}/c.{shard}" + ".0" * (array.ndim - 1)
            if file in artifact.manifest["files"]:
                artifact.fetch(file)
            total.update(np.asarray(array[shard * array.shards[0] : (shard + 1) * array.shards[0]]).tobytes())
    return total.hexdigest()


def _denoiser(name: str, path: Path | None) -> dict[str, str | None]:
    """Digests of the exported averages and of the newest checkpoint's full state, None where there is none."""
    if path is None:
        return {f"{name}_{part}": None for part in ("model", "ema", "optimizer", "losses")}
    from nestdiff_core.training.report import MEASURED

    newest = max((path / "checkpoints").glob("step_*"), default=None)  # stays on the machine that trained
    history = json.loads((path / "history.json").read_text())
    losses = [{k: v for k, v in line.items() if k not in MEASURED} for line in history]
    averages = sorted(path.glob("ema_*.safetensors"))
    more: dict[str, str | None] = {f"{name}_{file.stem}": _hash_tensors(file) for file in averages}
    return more | {
        f"{name}_model": None if newest is None else _hash_tensors(newest / "model.safetensors"),
        f"{name}_ema": _hash_tensors(path / "ema.safetensors"),
        f"{name}_optimizer": None if newest is None else _hash_tensors(newest / "optimizer.safetensors"),
        f"{name}_losses": _hash_plain(losses),
    }


def _hash_tensors(path: Path) -> str:
    from safetensors.numpy import load_file

    return _hash_arrays(sorted(load_file(path).items()))


def _hash_arrays(arrays: Iterable[tuple[str, Any]]) -> str:
    """Over name, type, shape and bytes of each array in order."""
    total = hashlib.sha256()
    for name, array in arrays:
        total.update(_header(name, array))
        total.update(array.tobytes())
    return total.hexdigest()


def _header(name: str, array: Any) -> bytes:
    return f"{name} {array.dtype.str} {array.shape}\n".encode()


def _hash_plain(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=True).encode()).hexdigest()
