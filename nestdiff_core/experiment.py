"""Which artifact belongs to which part of an experiment, and where it lies.

Of every stage (and level) lineage.py says which part of the configuration and which other artifacts it reads; from both
follows its address, here and nowhere else:

    root / stage / fingerprint(config, inputs' digests)

so two experiments that agree about images and encoder share one feature store, and a changed sigma_3 gives
new denoisers below level 3 and leaves everything else where it is.
"""

from __future__ import annotations

import os
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nestdiff_core.artifacts import SCHEMA_VERSION, Artifact, ArtifactWriter, open_artifact, writing
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.errors import IntegrityError, LockHeld
from nestdiff_core.files import MANIFEST, fingerprint, is_sealed, read_json
from nestdiff_core.lineage import PER_LEVEL, STAGES, Ref, level_features
from nestdiff_core.mirror import Mirror
from nestdiff_core.recipes.loader import loaded_from

Known = dict[Ref, Artifact]


def home() -> Path:
    """The artifact root: NESTDIFF_HOME, else `artifacts` in the working directory."""
    return Path(os.environ.get("NESTDIFF_HOME") or "artifacts").expanduser().absolute()


class Experiment:
    """An experiment's configuration joined with the artifact root: resolves every stage's artifact.

    mirror: the object storage that holds artifacts for several machines, where NESTDIFF_REMOTE names one.
    """

    def __init__(self, config: ExperimentConfig, root: Path | None = None) -> None:
        self.config = config
        self.root = root if root is not None else home()
        self.mirror = Mirror.from_environment(self.root)
        self._seen: dict[Path, str | None] = {}  # digest of what `find` found last, None: nothing

    def refs(self) -> list[Ref]:
        """Every artifact that this experiment needs, in the order in which they are made."""
        return [
            ref
            for stage in STAGES
            for ref in (
                [Ref(stage, level.level) for level in self.config.levels] if stage in PER_LEVEL else [Ref(stage)]
            )
            if self._needs(ref)
        ]

    def _needs(self, ref: Ref) -> bool:
        match ref:
            case ("design" | "watch", _):
                return False  # a proposal, which nothing reads; a history, which never ends
            case ("sweep", _):
                return self.config.sampling.chosen_by == "sweep"
            case ("text", _):
                return self.config.conditioning.labels == "text"
            case ("features", _):
                return self.config.features.keep
            case ("crops", int(level)):
                return self.config.features.keep and self.config.has_crops(level)
            case ("moments" | "svd_basis", level):
                return level != 1
            case _:
                return True

    def stage_config(self, ref: Ref) -> dict[str, Any]:
        """The part of the configuration that decides the artifact, as plain JSON."""
        return STAGES[ref.stage].config(self.config, ref.level or 0)

    def inputs(self, ref: Ref) -> tuple[Ref, ...]:
        return STAGES[ref.stage].inputs(self.config, ref.level or 0)

    def level_features(self, level: int) -> Ref:
        """Which feature store the tokens of a level above 1 come from."""
        return level_features(self.config, level)

    def config_hash(self, ref: Ref) -> str:
        """Hash of everything in the configuration that the artifact depends on, ancestors included.

        Known before anything has run; Dagster compares it to tell what went stale (design decision 3).
        """
        return fingerprint([ref.stage, self.stage_config(ref), [self.config_hash(i) for i in self.inputs(ref)]])

    def header(self, ref: Ref, *, _known: Known | None = None) -> dict[str, Any]:
        """What the artifact's manifest begins with: stage, level, fingerprint, config, inputs.

        Raises IntegrityError when an input has not been made.
        """
        stage, config, known = STAGES[ref.stage], self.stage_config(ref), {} if _known is None else _known
        inputs = []
        for i in self.inputs(ref):
            artifact = self.artifact(i, _known=known)
            grows = stage.grows(self.config) and i.stage == "images"
            inputs.append({"stage": i.stage, "identity": artifact.fingerprint if grows else artifact.digest})
        name = fingerprint({"schema_version": SCHEMA_VERSION, "stage": ref.stage, "config": config, "inputs": inputs})
        return {
            "stage": ref.stage,
            "level": ref.level,
            "fingerprint": name,
            "config": config,
            "inputs": inputs,
            "experiment": self.config.name,
        }

    def path(self, ref: Ref) -> Path:
        """Where the artifact lies, made or not; raises IntegrityError when an input has not been made."""
        return self.root / ref.stage / self.header(ref)["fingerprint"]

    def find(self, ref: Ref) -> Artifact | None:
        """The sealed artifact, or None when it (or something that it needs) has not been made."""
        try:
            path = self.path(ref)
        except IntegrityError:
            return None
        self._seen.pop(path, None)
        artifact = self._open(ref, path)
        self._seen[path] = None if artifact is None else artifact.digest
        return artifact

    def _open(self, ref: Ref, path: Path) -> Artifact | None:
        """The sealed artifact of `path`, brought here from object storage if need be."""
        if not is_sealed(path) and (self.mirror is None or not self.mirror.pull(path)):
            return None
        return open_artifact(path, stage=ref.stage, expected=path.name, mirror=self.mirror)

    def writing(self, ref: Ref, *, keep_parts: bool = False) -> AbstractContextManager[ArtifactWriter]:
        """Write the artifact under its lock; see `artifacts.writing`.

        Raises LockHeld where another process has made it since `find` looked: it was going to be made twice, and
        taken away from who has begun to read it.
        """
        path = self.path(ref)
        looked = path in self._seen
        seen = self._seen.pop(path, None)

        def check() -> None:
            if not looked:
                return
            now = None
            if is_sealed(path):
                now = read_json(path / MANIFEST, stage=ref.stage).get("digest")
            if now is not None and now != seen:
                raise LockHeld(
                    f"Another process has just made {ref}",
                    stage=ref.stage,
                    level=ref.level,
                    path=path,
                    fix="Run the same command again: it goes on from there.",
                )

        remade = seen is not None if looked else None  # what has come to object storage since is another's, and stays
        return writing(path, self.header(ref), keep_parts=keep_parts, mirror=self.mirror, remade=remade, check=check)

    def artifact(self, ref: Ref, *, _known: Known | None = None) -> Artifact:
        """The sealed artifact; else an IntegrityError: what is missing, what differs from the nearest one, the cure."""
        known = {} if _known is None else _known  # within one question every manifest is read once
        if ref in known:
            return known[ref]
        path = self.root / ref.stage / self.header(ref, _known=known)["fingerprint"]
        if (sealed := self._open(ref, path)) is not None:
            known[ref] = sealed
            return sealed
        expected, found = self._nearest(ref, path)
        raise IntegrityError(
            f"{ref} of experiment {self.config.name!r} has not been made with this configuration",
            stage=ref.stage,
            level=ref.level,
            path=path,
            expected=expected,
            found=found,
            fix=f"Run: {self.command(ref)}",
        )

    def command(self, ref: Ref) -> str:
        """What makes the artifact, to be typed where the experiment was loaded."""
        origin, job = loaded_from(self.config.name), STAGES[ref.stage].job.format(level=ref.level)
        which = "" if origin is None else f"NESTDIFF_EXPERIMENT={shlex.quote(origin)} "
        return f"{which}dagster job execute -m pipelines.definitions -j {job}"

    def _nearest(self, ref: Ref, path: Path) -> tuple[Any, Any]:
        """The settings in which the most similar artifact of this stage differs: (expected, found), or (None, None)."""
        wanted, best = self.header(ref), None
        for manifest in sorted(path.parent.glob("*/manifest.json")):
            other = read_json(manifest, stage=ref.stage)
            if other["experiment"] != self.config.name or other["level"] != ref.level:
                continue
            differing = differences(
                {k: wanted[k] for k in ("config", "inputs")}, {k: other[k] for k in ("config", "inputs")}
            )
            if best is None or len(differing) < len(best):
                best = differing
        if not best:
            return None, None
        return {k: v[0] for k, v in best.items()}, {k: v[1] for k, v in best.items()}


def differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves in which two pieces of plain data differ, by dotted path: that of `a`, that of `b`."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = {}
        for key in sorted(set(a) | set(b)):
            found |= differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = {}
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            found |= differences(x, y, f"{where}[{index}]")
        return found
    return {} if a == b else {where: (a, b)}
