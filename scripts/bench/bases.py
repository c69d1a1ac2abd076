"""Moments and basis against scikit-learn: time, and the share of the optimal variance that is captured."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA, TruncatedSVD

from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.moments import Moments
from scripts.bench.measure import compare

TOKENS, CHANNELS, KEPT, BATCH = 50_000, 768, 128, 4096


def run() -> None:
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1, 0.05, CHANNELS, dtype=np.float32)
    x = rng.standard_normal((TOKENS, CHANNELS), np.float32) * spectrum + rng.standard_normal(CHANNELS, np.float32)
    covariance = np.cov(x, rowvar=False, dtype=np.float64)
    optimum = np.linalg.eigvalsh(covariance)[-KEPT:].sum()

    def captured(components: np.ndarray) -> str:
        q = np.linalg.qr(components.T.astype(np.float64))[0]
        return f"1 - {1 - np.trace(q.T @ covariance @ q) / optimum:.1e}"

    def incremental() -> Any:
        pca = IncrementalPCA(KEPT, batch_size=BATCH)
        for start in range(0, TOKENS, BATCH):
            pca.partial_fit(x[start : start + BATCH])
        return pca.components_

    compare(
        f"{KEPT} components of {TOKENS:,} tokens with {CHANNELS} channels, float32",
        ("IncrementalPCA", incremental),
        {
            "TruncatedSVD (of centred tokens)": lambda: TruncatedSVD(KEPT).fit(x - x.mean(axis=0)).components_,
            "PCA, covariance_eigh": lambda: PCA(KEPT, svd_solver="covariance_eigh").fit(x).components_,
            "Moments.of + fit_basis": lambda: fit_basis(Moments.of(x), KEPT, 2).components.numpy(),
        },
        note=("captured variance", captured),
    )
