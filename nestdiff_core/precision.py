"""The arithmetic of networks: in which numbers matrix products are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def matrix_precision(precision: str) -> Iterator[None]:
    """Within the block float32 products are exact (`float32`), or made in TensorFloat-32 where the GPU can.

    For `bfloat16` as well as `tf32`: what autocast leaves in float32 need not be finer than TF32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    exact = precision == "float32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[object]:
    """The arithmetic of forward passes within the block: mixed for `bfloat16` and `float16`, else that of weights."""
    if precision in ("float32", "tf32"):
        return nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, precision))
