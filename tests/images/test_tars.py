"""A tar is whole, or it is refused; and whole tars are read as webdataset reads them."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nestdiff_core.errors import InputError
from nestdiff_core.images import tars


def members(num_samples: int = 6) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    pairs = [((f"k{i}.jpg", rng.bytes(300 + 90 * i)), (f"k{i}.cls", b"%d" % i)) for i in range(num_samples)]
    return [member for pair in pairs for member in pair]


def packed(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(tmp_path: Path, data: bytes, name: str = "a.tar") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_a_whole_tar_gives_its_samples(tmp_path: Path, compress: bool) -> None:
    """scan counts exactly the samples that read_samples gives, plain or gzipped."""
    data = packed(members())
    path = put(tmp_path, gzip.compress(data) if compress else data)
    assert tars.scan(path) == (6, [])
    samples = list(tars.read_samples(path))
    assert [s["__key__"] for s in samples] == [f"k{i}" for i in range(6)]
    assert {f"{s['__key__']}.{x}": s[x] for s in samples for x in ("jpg", "cls")} == dict(members())


def test_every_cut_is_found(tmp_path: Path) -> None:
    """Cut anywhere before its end blocks are complete, a tar is refused (webdataset alone lets one in five pass)."""
    data = packed(members(3))
    end = len(data.rstrip(b"\0"))
    end += -end % 512 + 1024
    path = tmp_path / "a.tar"
    for length in [*range(0, end, 61), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut off|cannot be read"):
            tars.scan(path)
    path.write_bytes(data[:end])
    assert tars.scan(path).num_samples == 3


def test_every_header_bit_counts(tmp_path: Path) -> None:
    """One flipped bit in the checksummed part of any header is found, with the header's offset."""
    data = packed(members(3))
    rng = np.random.default_rng(1)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [m.offset for m in tar]
    for offset in offsets:
        for byte in rng.choice(345, 12, replace=False):  # name .. prefix, as far as this tar fills them
            broken = bytearray(data)
            broken[offset + byte] ^= 1 << rng.integers(0, 7)
            with pytest.raises(InputError) as caught:
                tars.scan(put(tmp_path, bytes(broken)))
            assert str(offset) in caught.value.what or offset == 0


@pytest.mark.parametrize("data", [b"", b"\x07" * 5000, b"\x1f\x8b" + b"x" * 500, gzip.compress(b"hello", mtime=0)])
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    """Empty files, noise and broken gzip are named as such."""
    with pytest.raises(InputError, match=r"a\.tar"):
        tars.scan(put(tmp_path, data))


def test_gzip_cut_or_changed_is_refused(tmp_path: Path) -> None:
    """The check reads to the end of the gzip stream, so its checksum counts."""
    data = gzip.compress(packed(members()))
    for broken in (data[:-4], data[:-8] + b"\0\0\0\0" + data[-4:], data[: len(data) // 2]):
        with pytest.raises(InputError):
            tars.scan(put(tmp_path, broken))


def test_tars_glued_together_are_refused(tmp_path: Path) -> None:
    """What stands behind the end would be lost without a word."""
    with pytest.raises(InputError, match="behind its end"):
        tars.scan(put(tmp_path, packed(members(2)) + packed(members(3))))


def test_same_member_twice_is_refused(tmp_path: Path) -> None:
    """webdataset stops at it with an error of its own."""
    with pytest.raises(InputError, match="same member twice"):
        tars.scan(put(tmp_path, packed([("a.jpg", b"1"), ("a.jpg", b"2")])))


def test_links_devices_and_nameless_members_are_told(tmp_path: Path) -> None:
    """webdataset passes over them silently; scan lists every one, and they are never followed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in zip(
            "abcd", (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE), strict=True
        ):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", ".hidden", "__meta__/x.jpg", "e.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    scan = tars.scan(put(tmp_path, buffer.getvalue()))
    assert scan.num_samples == 1
    assert [s.name for s in scan.skipped] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "README", ".hidden", "__meta__/x.jpg"]
    assert [s["__key__"] for s in tars.read_samples(tmp_path / "a.tar")] == ["e"]


def test_sparse_and_extension_bombs_are_refused(tmp_path: Path) -> None:
    """A member that claims a terabyte, or an extension header that does, is never read into memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a.jpg",
                            "GNU.sparse.size": str(2**40), "GNU.sparse.map": f"0,0,{2**40},0"}  # fmt: skip
        tar.addfile(info)
    with pytest.raises(InputError, match="sparse member"):
        tars.scan(put(tmp_path, buffer.getvalue()))
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 2**33 - 1
    with pytest.raises(InputError, match="extension header"):
        tars.scan(put(tmp_path, long.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))
