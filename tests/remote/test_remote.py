"""Objects: whole or absent, created once, and every refusal names the object."""

import http.server
import os
import pickle
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nestdiff_core import remote
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError
from nestdiff_core.remote import Remote, is_url, make_room


def test_what_was_written_is_read(url: str, tmp_path: Path) -> None:
    store = Remote(url)
    assert store.read("a/b") is None and store.size("a/b") is None and store.state("a/b") is None
    assert store.create("a/b", b"one") and not store.create("a/b", b"two")
    assert store.read("a/b") == b"one" and store.read("a/b", 1, 3) == b"ne" and store.size("a/b") == 3
    before = store.state("a/b")
    store.replace("a/b", b"other")
    assert store.read("a/b") == b"other" and store.state("a/b") != before
    store.create("a/c/d", b"")
    assert store.sizes("a") == {"b": 5, "c/d": 0} and store.sizes("nothing") == {}
    assert pickle.loads(pickle.dumps(store)).read("a/b") == b"other"


def test_a_large_object_comes_in_ranges(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose length is no multiple of the range's, and an empty one."""
    monkeypatch.setattr(remote, "RANGE_BYTES", 2**16)
    for length in (0, 2**16, 5 * 2**16 + 7):
        (tmp_path / "from").write_bytes(np.random.default_rng(length).bytes(length))
        Remote(url).create(f"{length}", tmp_path / "from")
        Remote(url).fetch(f"{length}", tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == (tmp_path / "from").read_bytes()
    with pytest.raises(IntegrityError, match="absent"):
        Remote(url).fetch("absent", tmp_path / "never")
    assert not list(tmp_path.glob(".tmp-*")) and not (tmp_path / "never").exists()


def test_of_many_creators_one_wins(url: str) -> None:
    store = Remote(url)
    with ThreadPoolExecutor(16) as pool:
        for k in range(8):
            won = list(pool.map(lambda i, k=k: store.create(f"{k}", bytes([i])), range(16)))
            assert sum(won) == 1 and store.read(f"{k}") == bytes([won.index(True)])


def test_wrong_credentials_are_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 5, the object is named, the secret is not."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    with pytest.raises(EnvironmentFault) as refused:
        Remote(s3).read("x")
    assert refused.value.code == 5 and f"{s3}/x" in str(refused.value) and "AWS_ACCESS_KEY_ID" in refused.value.fix
    assert "canary-secret" not in refused.value.to_json()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Hands requests on to `endpoint`, but answers the first `failures` of each with 503."""

    endpoint = ""
    failures = 0
    seen: dict[tuple[str, str], int]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = (self.command, self.path)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= self.failures:
            self.send_error(503)
            return
        request = urllib.request.Request(
            self.endpoint + self.path, body or None, dict(self.headers), method=self.command
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.headers.get("Content-Length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_failing_server_is_asked_again_but_not_for_ever(
    s3: str, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """F64: two 503s are a matter of patience; a server that stays away is an EnvironmentFault."""
    retries = {**remote.RETRIES, "max_retries": 3}
    monkeypatch.setattr(remote, "RETRIES", retries)
    seen: dict[tuple[str, str], int] = {}
    settings = {"failures": failures, "seen": seen, "endpoint": os.environ["AWS_ENDPOINT_URL"]}
    handler = type("Handler", (Flaky,), settings)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        store = Remote(s3)
        if failures == 2:
            assert store.create("a", b"x") and store.read("a") == b"x"
        else:
            with pytest.raises(EnvironmentFault, match="committed work is kept"):
                store.replace("a", b"x")
            assert max(seen.values()) == 4
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("pipe:cat x", "not a URL of"),
        ("ftp://host/x", "not a URL of"),
        ("s3:/bucket", "not a URL of"),
        ("s3://key:secret@bucket/x", "holds credentials"),
    ],
)
def test_other_urls_are_refused(place: str, reason: str) -> None:
    assert is_url(place)
    with pytest.raises(ConfigError, match=reason) as refused:
        Remote(place)
    assert reason != "holds credentials" or "secret" not in refused.value.to_json()


def test_paths_are_no_urls() -> None:
    assert not any(map(is_url, ("/data/x", "data", "~/x", "data/a:b.tar", "c:")))


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abcd"]
    for age, file in enumerate(files):
        file.write_bytes(bytes(10))
        os.utime(file, (1000 + age, 1000 + age))
    make_room(files, None, 10**9)
    make_room(files, 40)
    assert all(file.exists() for file in files)
    make_room(files, 40, 15)
    assert [file.name for file in files if file.exists()] == ["c", "d"]
