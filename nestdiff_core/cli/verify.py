"""Check every file against its manifest, byte by byte: of an experiment's artifacts, checkpoints included, or of the
one artifact at a path or a URL.

TARGET is an experiment, the folder of an artifact or of its store, or where an artifact lies in object storage. All
damaged or missing files are named; the exit code is then 4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nestdiff_core.artifacts import Artifact, open_artifact
from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import MANIFEST, check_file
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="an experiment, or the path or URL of an artifact or its store"
    )


def run(arguments: argparse.Namespace) -> int:
    from nestdiff_core.remote import is_url

    target = arguments.target or ""
    folder = next((p for p in (Path(target), Path(target).parent) if (p / MANIFEST).is_file()), None)
    if is_url(target):
        checks = _at_url(target.rstrip("/").removesuffix("/store.zarr"))
    elif target and folder is not None:
        checks = _at_path(folder)
    else:
        checks = _of_experiment(Experiment(load_experiment(arguments.target)))
    first: IntegrityError | None = None
    for name, found in checks:
        if isinstance(found, IntegrityError):
            first = first or found
            print(f"{'DAMAGED':>10}  {name}: {found}", file=sys.stderr)
        else:
            print(f"{found:>10}  {name}")
    if first is not None:
        raise first
    return 0


Checks = Iterator[tuple[str, str | IntegrityError]]


def _of_experiment(x: Experiment) -> Checks:
    from nestdiff_core.stages import CHECKPOINTS
    from nestdiff_core.training.checkpoint import list_checkpoints, read_checkpoint

    for ref in x.refs():
        try:
            artifact = x.find(ref)
        except IntegrityError as error:
            yield str(ref), error
            continue
        if artifact is None:
            yield str(ref), "not made"
            continue
        yield from _files(artifact, str(ref))
        if ref.stage == "denoiser":
            for checkpoint in list_checkpoints(artifact.path / CHECKPOINTS):
                try:
                    read_checkpoint(checkpoint, level=ref.level or 0, expected=artifact.fingerprint)
                except IntegrityError as error:
                    yield f"{ref} {checkpoint.name}", error


def _files(artifact: Artifact, name: str) -> Checks:
    """Every difference, then the artifact's size where there is none."""
    total, damaged = 0, False
    for found in artifact.check():
        if isinstance(found, IntegrityError):
            damaged = True
            yield name, found
        else:
            total += found
    if not damaged:
        yield f"{name}  {artifact.path}", f"{total / 2**20:.1f} MiB"


def _at_path(folder: Path) -> Checks:
    artifact = open_artifact(folder, stage=folder.parent.name)
    yield from _files(artifact, str(Ref(artifact.stage, artifact.level)))


def _at_url(url: str) -> Checks:
    """Objects are brought here one at a time, compared, and removed."""
    from nestdiff_core.mirror import Mirror

    root, stage, address = url.rsplit("/", 2)
    with tempfile.TemporaryDirectory() as folder:
        mirror, path = Mirror(root, Path(folder), cache_bytes=0), Path(folder) / stage / address
        if not mirror.pull(path):
            raise IntegrityError(
                "There is no artifact at this URL",
                path=url,
                expected="URL/STAGE/FINGERPRINT",
                fix="Give the folder that artifact.tar is in.",
            )
        artifact = open_artifact(path, stage=stage, expected=address)
        total, damaged = 0, False
        for name, record in artifact.manifest["files"].items():
            try:
                total += check_file(mirror.fetch(path, name, record), record, stage=stage, level=artifact.level)
            except IntegrityError as error:
                damaged = True
                yield f"{stage} {name}", error
        if not damaged:
            yield f"{Ref(stage, artifact.level)}  {url}", f"{total / 2**20:.1f} MiB"
