"""Two "hosts" that are network namespaces, and a real Slurm of two nodes.

Namespaces need root and iproute2, Slurm needs Debian's slurm-wlm and munge; where they
are missing, tests skip and say so.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Host, Level, ip

INPUTS = ("images", "encoder", "features", "moments", "svd_basis", "latents")


@pytest.fixture
def level(toy_run: Any, tmp_path: Path) -> Level:
    root = tmp_path / "home"
    for stage in INPUTS:
        shutil.copytree(toy_run.root / stage, root / stage)
    return Level(root)


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces with a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    hosts = Host(f"nestdiff-{tag}a", "10.77.0.1"), Host(f"nestdiff-{tag}b", "10.77.0.2")
    made = []
    try:
        for host in hosts:
            try:
                ip("netns", "add", host.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            made.append(host)
        ends = [(host, f"nd{tag}{side}") for host, side in zip(hosts, "ab", strict=True)]
        (a, end_a), (b, end_b) = ends
        ip("link", "add", end_a, "netns", a.namespace, "type", "veth", "peer", "name", end_b, "netns", b.namespace)
        for host, end in ends:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in made:
            host.cut_power()
            ip("netns", "del", host.namespace)
