"""WebDataset shards that are read from object storage or a web server."""

import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestdiff_core.artifacts import Artifact, writing
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.images.build import build_images, source_listing
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.remote import Remote

NUM_SHARDS = 3


def shard(number: int) -> bytes:
    """A tar of four photographs of noise."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(4):
            picture = io.BytesIO()
            pixels = np.random.default_rng([number, i]).integers(0, 256, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(picture, format="PNG")
            for suffix, data in (("png", picture.getvalue()), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{number}-{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def images(path: str) -> ImagesConfig:
    return ImagesConfig(source="webdataset", path=path, resolution=8, labels=True)


def build(config: ImagesConfig, root: Path) -> ImageIndex:
    header = {"stage": "images", "level": None, "fingerprint": "f", "config": {}, "inputs": [], "experiment": "e"}
    with writing(root / "images" / "f", header) as writer:
        artifact: Artifact = writer.seal(**build_images(config, writer))
    return ImageIndex(artifact)


@pytest.fixture
def local(tmp_path: Path) -> ImageIndex:
    (tmp_path / "shards").mkdir()
    for number in range(NUM_SHARDS):
        (tmp_path / "shards" / f"train-{number:05d}.tar").write_bytes(shard(number))
    return build(images(str(tmp_path / "shards")), tmp_path / "local")


@pytest.fixture
def stored(url: str) -> Remote:
    store = Remote(url)
    for number in range(NUM_SHARDS):
        store.create(f"train-{number:05d}.tar", shard(number))
    store.create("README.txt", b"no shard")
    return store


@pytest.mark.parametrize("pattern", ["", "/train-*.tar", "/train-{00000..00002}.tar", "/train-0000[0-2].tar"])
def test_a_url_is_read_as_a_folder_is(local: ImageIndex, stored: Remote, tmp_path: Path, pattern: str) -> None:
    index = build(images(stored.url + pattern), tmp_path / "away")
    assert (index.keys, index.labels.tolist()) == (local.keys, local.labels.tolist())
    assert [(s.sha256, s.size) for s in index.shards] == [(s.sha256, s.size) for s in local.shards]
    assert [s.path for s in index.shards] == [f"{stored.url}/train-{n:05d}.tar" for n in range(NUM_SHARDS)]
    for k in range(NUM_SHARDS):
        assert np.array_equal(index.read_shard(k), local.read_shard(k))


def test_a_shard_that_changed_is_refused(stored: Remote, tmp_path: Path) -> None:
    """Its listing tells before it is read, and its hash once it is; nothing is read from the cache that is not it."""
    config = images(stored.url)
    index, before = build(config, tmp_path), source_listing(config)
    assert source_listing(config) == before
    for copy in (tmp_path / "cache").iterdir():
        copy.unlink()
    stored.replace("train-00001.tar", shard(7))
    assert source_listing(config) != before
    assert index.read_shard(0).shape == (4, 8, 8, 3)
    with pytest.raises(IntegrityError, match="another content") as refused:
        index.read_shard(1)
    assert refused.value.path == f"{stored.url}/train-00001.tar" and refused.value.key == "00001"


def test_a_cut_or_missing_shard_is_named_by_its_url(stored: Remote, tmp_path: Path) -> None:
    stored.replace("train-00001.tar", shard(1)[:3000])
    with pytest.raises(InputError, match=r"train-00001\.tar") as refused:
        build(images(stored.url), tmp_path)
    assert refused.value.path == f"{stored.url}/train-00001.tar"
    with pytest.raises(InputError, match="2 of 5 shards are missing"):
        build(images(f"{stored.url}/train-{{00000..00004}}.tar"), tmp_path)
    with pytest.raises(InputError, match="matches no shards"):
        build(images(f"{stored.url}/nothing-*.tar"), tmp_path)


def test_the_cache_has_a_limit(stored: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of shards that were read longest ago go; what is read stays right."""
    monkeypatch.setenv("NESTDIFF_CACHE_GIB", str(1.5 * len(shard(0)) / 2**30))
    index = build(images(stored.url), tmp_path)
    for _ in range(2):
        for k in range(NUM_SHARDS):
            assert index.read_shard(k).shape == (4, 8, 8, 3)
            assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    for number in range(NUM_SHARDS):
        (tmp_path / "site" / f"{number}.tar").write_bytes(shard(number))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_web_server_is_read(web: str, local: ImageIndex, tmp_path: Path) -> None:
    index = build(images(f"{web}/{{0..2}}.tar"), tmp_path / "away")
    assert index.num_images == local.num_images and np.array_equal(index.read_shard(2), local.read_shard(2))


def test_a_listing_takes_one_request(stored: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sensor asks every minute whether there are new shards: not shard by shard."""
    asked: list[str] = []
    original = Remote._list
    monkeypatch.setattr(Remote, "_head", lambda *_: pytest.fail("asked for one object"))
    monkeypatch.setattr(Remote, "_list", lambda self, prefix: asked.append(self.url) or original(self, prefix))
    for pattern in ("", "/train-*.tar", "/train-{00000..00002}.tar"):
        asked.clear()
        assert source_listing(images(stored.url + pattern)) is not None
        assert asked == [stored.url]
