"""Check this machine and the artifact root: versions, free space, unfinished work, litter, live locks, object storage.

Also proves on the spot that a store with a missing shard is refused rather than read as zeros.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import uuid
from pathlib import Path

from nestdiff_core.errors import EnvironmentFault, IntegrityError
from nestdiff_core.experiment import home
from nestdiff_core.files import LOCK, MANIFEST, TEMPORARY, DirectoryLock
from nestdiff_core.mirror import Mirror
from nestdiff_core.remote import Remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(arguments: argparse.Namespace) -> int:
    del arguments
    import torch
    import zarr

    root = home()
    print(
        f"torch {torch.__version__}, zarr {zarr.__version__}, {torch.cuda.device_count()} GPUs, "
        f"{torch.get_num_threads()} threads"
    )
    _self_test()
    print("a missing shard is refused: yes")
    if (mirror := Mirror.from_environment(root)) is not None:
        _try_object_storage(mirror.remote)
        print(f"object storage {mirror.remote.url}: creates an object once, and only once")
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    print(f"artifact root {root}: {free / 2**30:.1f} GiB free")
    for line in survey(root):
        print(line)
    if free < 2**30:
        raise EnvironmentFault(
            "The artifact root has little space left",
            path=root,
            expected="at least 1 GiB",
            found=f"{free / 2**30:.2f} GiB",
            fix="Free some space or move NESTDIFF_HOME.",
        )
    return 0


def survey(root: Path) -> list[str]:
    """A line for each unsealed artifact (being written, or left by a stopped run) and for temporary files."""
    lines = []
    for lock in sorted(root.glob(f"*/*/{LOCK}")):
        folder = lock.parent
        if (folder / MANIFEST).is_file():
            continue
        try:
            with DirectoryLock(folder):
                state = "unfinished: materialise it again to go on"
        except EnvironmentFault as error:
            state = f"being written, {error.found}"
        lines.append(f"{folder.relative_to(root)}: {state}")
    litter = [path for pattern in (f"{TEMPORARY}*", "*.partial") for path in root.glob(f"**/{pattern}")]
    if litter:
        lines.append(f"{len(litter)} temporary files of stopped runs; `python -m nestdiff_core gc` lists them")
    return lines


def _try_object_storage(remote: Remote) -> None:
    """Sharing artifacts rests on this: of two who create an object, one is refused."""
    key, data = f"doctor/{uuid.uuid4().hex}", b"May be removed."
    first, second, read = remote.create(key, data), remote.create(key, b"another"), remote.read(key)
    remote.remove(key)
    if (first, second, read) != (True, False, data):
        raise EnvironmentFault(
            "Object storage does not refuse to create an object that is there",
            path=remote.url,
            expected="support for If-None-Match: *",
            fix="Do not share artifacts through it; use a service that supports it.",
        )


def _self_test() -> None:
    import numpy as np

    from nestdiff_core.stores.reader import StoreReader
    from nestdiff_core.stores.writer import create_store, write_shard

    with tempfile.TemporaryDirectory(prefix="nestdiff-") as folder:
        store = Path(folder) / "store.zarr"
        create_store(store, {"z": (1, 1, 1)}, "float16", [4, 4], 2, {})
        write_shard(store, 0, {"z": np.ones((4, 1, 1, 1), np.float16)})
        try:
            StoreReader(store, "z").read(np.arange(8))
        except IntegrityError:
            return
    raise IntegrityError(
        "A missing shard was read as if it were there",
        stage="doctor",
        path="(self-test)",
        fix="This zarr version does not suit; install the versions of requirements.lock.",
    )
