"""Two "hosts" that are network namespaces, and a real Slurm of two nodes.

Namespaces need root and iproute2, Slurm needs Debian's slurm-wlm and munge; where they
are missing, tests skip and say so.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Host, Level, Slurm, ip
from processes import free_port, wait_for

INPUTS = ("images", "encoder", "features", "moments", "svd_basis", "latents")


def level_of(toy_run: Any, root: Path) -> Level:
    for stage in INPUTS:
        shutil.copytree(toy_run.root / stage, root / stage)
    return Level(root)


@pytest.fixture
def level(toy_run: Any, tmp_path: Path) -> Level:
    return level_of(toy_run, tmp_path / "home")


@pytest.fixture(scope="session")
def undisturbed(toy_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Level:
    """The same, trained by two processes of this machine without any fault."""
    level = level_of(toy_run, tmp_path_factory.mktemp("undisturbed") / "home")
    level.start("--processes=2").ends(0)
    assert level.digest() is not None
    return level


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


# --- Slurm --------------------------------------------------------------------------------------------------------

SLURM_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol")
SLURM_CONF = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=20
SlurmdTimeout=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=100000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUP_CONF = """CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


@contextlib.contextmanager
def slurm_daemons(folder: Path) -> Iterator[Slurm]:
    """A controller and two nodes of one machine, listening on loopback only."""
    controller, n1, n2 = free_port(), free_port(), free_port()
    (folder / "state").mkdir()
    # Without the freezer of cgroup v1 processes that leave their session would outlive their job.
    proctrack = "cgroup" if Path("/sys/fs/cgroup/freezer").is_dir() else "linuxproc"
    names = {"folder": folder, "controller": controller, "n1": n1, "n2": n2, "proctrack": proctrack}
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=socket.gethostname().split(".")[0], **names))
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    munge = ["munged", "--foreground", "--force", "--key-file", f"{folder}/key", "--socket", f"{folder}/munge.socket"]
    munge += ["--pid-file", f"{folder}/munged.pid", "--log-file", f"{folder}/munged.log"]
    munge += ["--seed-file", f"{folder}/munged.seed"]
    slurm = Slurm(conf)
    try:
        slurm.start("munged", munge)
        wait_for((folder / "munge.socket").exists, 20, "the start of munged")
        slurm.start("slurmctld", ["slurmctld", "-D", "-f", str(conf)])
        for node in ("n1", "n2"):
            slurm.start(node, ["slurmd", "-D", "-N", node, "-f", str(conf)])
        wait_for(lambda: slurm.ask("sinfo", "-h", "-o", "%D %t") == "2 idle", 60, "two idle nodes")
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    if missing := [program for program in SLURM_PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"a real Slurm needs {missing[0]} (Debian: slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("Slurm was set up for root only")
    with tempfile.TemporaryDirectory(prefix="nestdiff-slurm-") as folder:
        Path(folder).chmod(0o755)  # munge: others have to reach the socket
        with slurm_daemons(Path(folder)) as slurm:
            yield slurm


@pytest.fixture
def slurm(slurm_cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A cluster without jobs, which the commands of this process use."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    yield slurm_cluster
    slurm_cluster.cancel_all()
