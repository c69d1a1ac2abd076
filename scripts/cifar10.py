"""WebDataset shards of CIFAR-10 from its public archive, without loss: PNG images and their classes, by split.

curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
python -m scripts.cifar10 cifar-10-binary.tar.gz data/cifar10

The archive's binary version is read (a byte for the class, 3,072 for the image): the others are pickles, which may hold
any program.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from nestdiff_core.errors import InputError, NestdiffError
from nestdiff_core.progress import Progress, TerminalProgress, silent

FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
RECORDS, BYTES, SHARD = 10_000, 1 + 3 * 32 * 32, 5_000


def read_batch(archive: Path, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Class and image uint8 (32, 32, 3) of every record of a batch file. Raises InputError for another kind of file."""
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(f"cifar-10-batches-bin/{name}")
            data = b"" if file is None else file.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise _unusable(archive, name, str(error)) from error
    if len(data) != RECORDS * BYTES:
        raise _unusable(archive, name, f"{len(data):,} bytes")
    for record in np.frombuffer(data, np.uint8).reshape(RECORDS, BYTES):
        if record[0] > 9:
            raise _unusable(archive, name, f"a class {record[0]}")
        yield int(record[0]), record[1:].reshape(3, 32, 32).transpose(1, 2, 0)


def convert(archive: Path, folder: Path, progress: Progress = silent) -> None:
    """Write shards of 5,000 images of a split each into `folder`, in the archive's order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in FILES.items():
        records = enumerate(record for name in names for record in read_batch(archive, name))
        for shard, several in itertools.groupby(records, lambda numbered: numbered[0] // SHARD):
            with (
                (folder / f"cifar10-{split}-{shard:05d}.tar").open("wb") as file,
                TarWriter(file, encoder=False, mtime=0) as tar,
            ):
                for i, (label, pixels) in several:
                    png = io.BytesIO()
                    Image.fromarray(pixels).save(png, "PNG")
                    tar.write({"__key__": f"{split}-{i:05d}", "png": png.getvalue(), "cls": str(label).encode()})
                    progress(i + 1, RECORDS * len(names), split)


def _unusable(archive: Path, name: str, found: str) -> InputError:
    return InputError(
        "This is not CIFAR-10's binary archive",
        path=archive,
        key=name,
        expected=f"{RECORDS:,} records of {BYTES} bytes",
        found=found,
        fix="Download cifar-10-binary.tar.gz again.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    progress = TerminalProgress()
    try:
        convert(arguments.archive, arguments.folder, progress)
    except NestdiffError as error:
        raise SystemExit(f"{error}") from None
    finally:
        progress.close()


if __name__ == "__main__":
    main()
