"""Decoding many images: in processes of their own, where it is enough work to start them.

So the encoder keeps the interpreter, and an image can at worst kill its decoder: one that crashes it, hangs, or wants
more memory than DECODER_BYTES is an image that cannot be decoded, with that as the reason. The same function decodes
here and there, so the bits do not depend on where.

A decoder is this module run as a program. It reads requests from its standard input, answers image by image on its
standard output, and ends when its input does. Nothing is unpickled on either side.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nestdiff_core
from nestdiff_core.errors import ConfigError, InputError
from nestdiff_core.images.pixels import decode, encode_png, square

DECODERS_VARIABLE = "NESTDIFF_DECODERS"
MAX_DECODERS, LEAST_CORES = 16, 4
START_BYTES = 2**24  # of encoded images; with fewer the work is done before a decoder has started
SMALL_BYTES = 2**12  # the mean encoded image below which travelling to a decoder costs more than decoding here
BATCH = 16  # images in a request
DECODER_BYTES = 2**32  # of address space
IMAGE_SECONDS = 60

Want = Literal["check", "png", "pixels"]


class Picture(NamedTuple):
    """A decoded image: size of the upright original, whether further frames were left out, and what was wanted of it.

    content: nothing for `check`; for `png` the squared image as PNG; for `pixels` its values, row by row.
    sha256: of that PNG, else of the encoded bytes.
    """

    width: int
    height: int
    animated: bool
    sha256: str
    content: bytes


class Failure(NamedTuple):
    """No image, and why."""

    reason: str


def decode_one(data: bytes, resolution: int, channels: int, want: Want) -> Picture | Failure:
    """Decode all of an image to a square of `resolution` and `channels`; what every stage does."""
    try:
        image, animated = decode(data)
        pixels = square(image, resolution, channels)
    except InputError as error:
        return Failure(error.what)
    match want:
        case "check":
            content = b""
        case "png":
            content = encode_png(pixels)
        case "pixels":
            content = pixels.tobytes()
    sha256 = hashlib.sha256(content if want == "png" else data).hexdigest()
    return Picture(*image.size, animated, sha256, content)


class Decoders:
    """Up to `workers` decoder processes, started when they are needed; 0: threads of this process.

    program: the command that a decoder is.
    """

    def __init__(self, workers: int, program: Sequence[str] = (sys.executable, "-m", __name__)) -> None:
        self.workers, self.program = workers, program
        self._threads = ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        self._seen = 0

    def map(self, images: Iterable[bytes], resolution: int, channels: int, want: Want) -> Iterator[Picture | Failure]:
        """`decode_one` of each, in order, some batches ahead of what is asked for."""
        ahead: deque[Future[list[Picture | Failure]]] = deque()
        images = iter(images)
        while batch := list(itertools.islice(images, BATCH)):
            ahead.append(self._threads.submit(self._decode, batch, (resolution, channels, want)))
            if len(ahead) > 2 * (self.workers or os.cpu_count() or 1):
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()

    def _decode(self, batch: list[bytes], settings: tuple[int, int, Want]) -> list[Picture | Failure]:
        size = sum(map(len, batch))
        self._seen += size
        if self.workers == 0 or self._seen < START_BYTES or size < SMALL_BYTES * len(batch):
            return [decode_one(data, *settings) for data in batch]
        try:
            decoder = self._idle.get_nowait()
        except queue.Empty:
            decoder = _Decoder(self.program)
        try:
            return decoder.decode(batch, settings)
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """End all processes and threads."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()


@cache
def decoders() -> Decoders:
    """Those of this process: NESTDIFF_DECODERS of them, else one for every core but one.

    Below LEAST_CORES none: on two cores an encoder whose threads wait for each other loses more than decoding gains.
    """
    text = os.environ.get(DECODERS_VARIABLE)
    if text is None:
        cores = len(os.sched_getaffinity(0))
        return Decoders(min(MAX_DECODERS, cores - 1) if cores >= LEAST_CORES else 0)
    if not text.isdigit():
        raise ConfigError(
            f"{DECODERS_VARIABLE} is not a number",
            key=DECODERS_VARIABLE,
            expected="how many processes decode images; 0 for none",
            found=text,
            fix="Correct it, or leave it out.",
        )
    return Decoders(int(text))


class _Decoder:
    """A decoder process, started again when an image has killed it."""

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, batch: list[bytes], settings: tuple[int, int, Want]) -> list[Picture | Failure]:
        answers: list[Picture | Failure] = []
        while len(answers) < len(batch):
            process = self._process = self._process or self._start()
            try:
                self._ask(process, batch[len(answers) :], settings)
                while len(answers) < len(batch):
                    answers.append(self._answer(process))
            except (OSError, EOFError):  # the image whose answer should have come has ended it
                answers.append(Failure(f"cannot be decoded ({self._end(process)})"))
                self._process = None
        return answers

    def stop(self) -> None:
        if self._process is not None:
            self._end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        path = [str(Path(nestdiff_core.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], images: list[bytes], settings: tuple[int, int, Want]) -> None:
        assert process.stdin is not None
        request = {"settings": settings, "seconds": IMAGE_SECONDS, "sizes": [len(data) for data in images]}
        process.stdin.write(json.dumps(request).encode() + b"\n" + b"".join(images))
        process.stdin.flush()

    @staticmethod
    def _answer(process: subprocess.Popen[bytes]) -> Picture | Failure:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer = json.loads(line)
        if "reason" in answer:
            return Failure(answer["reason"])
        content = process.stdout.read(answer.pop("size"))
        return Picture(**answer, content=content)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> str:
        """End a decoder; returns how it had ended by itself, if so."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # what was still to be written to it
            process.stdin.close()
        code = process.wait()
        if code == -signal.SIGALRM:
            return f"it took more than {IMAGE_SECONDS} seconds"
        return f"it ended its decoder: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def serve() -> None:
    """Be a decoder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's; it ends us by ending
    resource.setrlimit(resource.RLIMIT_AS, (DECODER_BYTES, DECODER_BYTES))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request: dict[str, Any] = json.loads(line)
        images = [requests.read(size) for size in request["sizes"]]
        for data in images:
            signal.alarm(request["seconds"])  # not handled: it ends a decoder that hangs, even within C
            try:
                found = decode_one(data, *request["settings"])
            except MemoryError:
                found = Failure(f"cannot be decoded (it takes more than {DECODER_BYTES / 2**30:g} GiB)")
            signal.alarm(0)
            if isinstance(found, Failure):
                answers.write(json.dumps(found._asdict()).encode() + b"\n")
            else:
                about = {**found._asdict(), "size": len(found.content)}
                del about["content"]
                answers.write(json.dumps(about).encode() + b"\n" + found.content)
            answers.flush()


if __name__ == "__main__":
    serve()
