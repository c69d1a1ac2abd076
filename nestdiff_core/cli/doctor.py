"""Check this machine and the artifact root: versions, limits, clock, free space, processes, unfinished work, litter.

Also proves on the spot that a store with a missing shard is refused rather than read as zeros, that a lock keeps a
second process out, and that object storage, where there is one, creates an object once. Exit code 5 where the machine
cannot be relied on, with the first reason; what may still go well is a line that begins with `!`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from nestdiff_core.errors import EnvironmentFault, IntegrityError
from nestdiff_core.experiment import home
from nestdiff_core.files import LOCK, MANIFEST, TEMPORARY, DirectoryLock, environment_faults
from nestdiff_core.mirror import Mirror
from nestdiff_core.remote import Remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


OLDEST_TORCH = (2, 10)  # before it `weights_only` could be got round (CVE-2026-24747)
HANDLES = 256  # a training has some hundred open: shards, sockets, libraries
GIB = 2**30


class Trainer(NamedTuple):
    """A process `python -m nestdiff_core train ...` of this machine."""

    pid: int
    parent: int
    command: str


def run(arguments: argparse.Namespace) -> int:
    del arguments
    import torch
    import zarr

    root = home()
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, zarr {zarr.__version__}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise EnvironmentFault(
            "This torch reads weights unsafely",
            expected=">= 2.10",
            found=torch.__version__,
            fix="Install the versions of requirements.lock.",
        )
    for line in (*_devices(), *_limits(), *_clock(root)):
        print(line)
    _self_test()
    print("a missing shard is refused: yes")
    _try_lock()
    print("a lock keeps a second process out: yes")
    if (mirror := Mirror.from_environment(root)) is not None:
        _try_object_storage(mirror.remote)
        print(f"object storage {mirror.remote.url}: creates an object once, and only once")
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    print(f"artifact root {root}: {free / GIB:.1f} GiB free")
    for line in (*_processes(), *survey(root)):
        print(line)
    if free < GIB:
        raise EnvironmentFault(
            "The artifact root has little space left",
            path=root,
            expected="at least 1 GiB",
            found=f"{free / GIB:.2f} GiB",
            fix="Free some space or move NESTDIFF_HOME.",
        )
    return 0


def _devices() -> list[str]:
    import torch

    lines = [f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs"]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        lines.append(f"cuda:{i} {name}, CUDA {torch.version.cuda}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")
    if not torch.cuda.is_available() and Path("/proc/driver/nvidia").exists():
        lines.append(
            f"! there is an NVIDIA driver, and torch (CUDA {torch.version.cuda}) cannot use it: see nvidia-smi"
        )
    return lines


def _limits() -> list[str]:
    """What a shell or a container may have set too low."""
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    lines = [f"open files {handles}, temporary files in {tempfile.gettempdir()}"]
    if handles != resource.RLIM_INFINITY and handles < HANDLES:
        lines.append(f"! few open files are allowed: ulimit -n {HANDLES} or more")
    wanted = os.environ.get("TMPDIR")
    if wanted and not os.access(wanted, os.W_OK):
        lines.append(f"! TMPDIR {wanted} cannot be written")
    for place in ("/dev/shm", tempfile.gettempdir()):
        if Path(place).is_dir() and (free := shutil.disk_usage(place).free) < GIB // 16:
            lines.append(f"! {place} has {free / 2**20:.0f} MiB free; NCCL and temporary files need more")
    return lines


def _clock(root: Path) -> list[str]:
    """No result depends on the clock; what people read in the UI does."""
    newest = max((path.stat().st_mtime for path in root.glob(f"*/*/{MANIFEST}")), default=0.0)
    ahead = newest - time.time()
    return (
        [f"! the newest artifact is {ahead / 3600:.1f} hours in the future: is the clock right?"] if ahead > 60 else []
    )


def _processes() -> list[str]:
    """Trainings of this user, whatever their artifact root; those whose launcher has died are ending or hang."""
    return [
        f"{'! left behind' if trainer.parent == 1 else 'running'}, pid {trainer.pid}: {trainer.command}"
        for trainer in trainers()
    ]


def trainers() -> list[Trainer]:
    """The outermost process of each training on this machine; none where there is no /proc."""
    found: dict[int, Trainer] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "train" in words and words[words.index("train") - 2 : words.index("train")] == ["-m", "nestdiff_core"]:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = Trainer(int(folder.name), parent, " ".join(words[1:]).strip())
    return [found[pid] for pid in sorted(found) if found[pid].parent not in found]


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


def _try_lock() -> None:
    """One writer at a time rests on this; some network file systems only pretend."""
    folder = home()
    where = next(p for p in (folder, *folder.parents) if p.exists())
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with (
        environment_faults(where),
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=where) as trial,
        DirectoryLock(Path(trial)) as lock,
    ):
        second = subprocess.run([sys.executable, "-c", code, str(lock.path)], capture_output=True)
    if second.returncode == 0:
        raise EnvironmentFault(
            "Two processes can hold the same lock",
            path=where,
            expected="a file system with flock",
            fix="Put NESTDIFF_HOME on a local file system.",
        )


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
