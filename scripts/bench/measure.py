"""How everything here is measured, and the pictures that it is measured on."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Call = Callable[[], Any]


def compare(
    title: str,
    peer: tuple[str, Call],
    others: dict[str, Call],
    *,
    rounds: int = 3,
    note: tuple[str, Callable[[Any], str]] | None = None,
    clock: Callable[[], float] = time.process_time,
    rate: tuple[str, Callable[[float], str]] | None = None,
) -> None:
    """Call the peer, the peer again and the others in turn, `rounds` times after a warm-up; print medians of CPU time.

    A ratio is the peer's time over the call's: above 1 is faster than the peer. The second line is the control, which
    says how far a ratio can be trusted. note: a further column's name, and what it says of a call's last result; rate:
    one that is said of the median, in seconds. clock: what is measured where it is not CPU time.
    """
    name, call = peer
    calls = {name: call, f"{name}, again": call, **others}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for counted in range(-1, rounds):
        for name, call in calls.items():
            start = clock()
            results[name] = call()
            if counted >= 0:
                seconds[name].append(clock() - start)
    rows = [
        [name, f"{median(times) * 1e3:.2f}", f"{median(seconds[peer[0]]) / median(times):.3g}"]
        + ([note[1](results[name])] if note else [])
        + ([rate[1](median(times))] if rate else [])
        for name, times in seconds.items()
    ]
    unit = "CPU ms" if clock is time.process_time else "ms"
    table(title, ["", unit, "ratio", *([note[0]] if note else []), *([rate[0]] if rate else [])], rows)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n**{title}**\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    """uint8 images (n, side, side, 3) as smooth as photographs, with a little noise: noise alone would not compress."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, 8, 8, generator=generator)
    x = F.interpolate(low, size=(side, side), mode="bicubic").add_(
        torch.randn(n, 3, side, side, generator=generator) / 60
    )
    return (x.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
