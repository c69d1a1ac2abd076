"""Object storage for tests: a folder behind the same interface, and a real S3 server, Ceph's radosgw.

The server is one monitor, one in-memory OSD and one gateway on loopback, in a private folder; it starts in some ten
seconds and needs Debian's ceph-mon, ceph-osd and radosgw, and root.
"""

import contextlib
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from processes import free_port

ACCESS, SECRET = "nestdiff-test", "nestdiff-test-secret"
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool", "ceph")
CEPH_CONF = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor}
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
crash dir = {folder}/log
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
# without these two an OSD here often dies at its start: "unable to update_crush_device_class"
osd crush update on start = false
osd class update on start = false
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}/run
"""


@contextlib.contextmanager
def radosgw(folder: Path) -> Iterator[str]:
    """Endpoint of an S3 server that lives while the block does."""
    for name in ("mon", "osd", "run", "log"):
        (folder / name).mkdir()
    fsid, osd, monitor, gateway = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    conf, keyring, monmap = folder / "ceph.conf", str(folder / "keyring"), str(folder / "monmap")
    conf.write_text(CEPH_CONF.format(folder=folder, fsid=fsid, monitor=monitor, gateway=gateway))
    ceph, children = ("-c", str(conf)), []

    def run(*command: str, seconds: float = 0.0) -> None:
        """seconds: for how long it may be refused."""
        end = time.monotonic() + seconds
        while (done := subprocess.run(command, capture_output=True, text=True, timeout=60)).returncode:
            assert time.monotonic() < end, f"{command}: {done.stderr}"
            time.sleep(0.5)

    def start(*command: str) -> None:
        children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *")
        run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{monitor}]", "--fsid", fsid, monmap)
        run("ceph-mon", *ceph, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        start("ceph-mon", *ceph, "-i", "a", "-f")
        run("ceph", *ceph, "--connect-timeout", "30", "osd", "new", osd)
        run("ceph-osd", *ceph, "-i", "0", "--mkfs", "--osd-uuid", osd)
        # a busy monitor refuses it until it knows the OSD
        run("ceph", *ceph, "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h1", seconds=30)
        start("ceph-osd", *ceph, "-i", "0", "-f")
        user = ("--uid=t", "--display-name=t", f"--access-key={ACCESS}", f"--secret={SECRET}")
        run("radosgw-admin", *ceph, "user", "create", *user)
        start("radosgw", *ceph, "-n", "client.rgw.a", "-f")
        endpoint, deadline = f"http://127.0.0.1:{gateway}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(endpoint, timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield endpoint
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"a real S3 server needs {missing[0]} (Debian: ceph-mon ceph-osd radosgw)")
    if os.geteuid() != 0:
        pytest.skip("radosgw was set up for root only")
    with radosgw(tmp_path_factory.mktemp("ceph")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket, with endpoint and credentials in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "default",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    store = S3Store(bucket, client_options={"allow_http": True})
    create = urllib.request.Request(obstore.sign(store, "PUT", "", timedelta(minutes=1)), method="PUT")
    urllib.request.urlopen(create)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place in object storage."""
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return f"file://{tmp_path}/object-storage"
