"""Building blocks of U-ViT."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nestdiff_core.models.layers import Attention, PatchEmbed, sincos_positions, timestep_embedding, unpatchify

PARITY = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity"


@pytest.mark.skipif(not PARITY.is_dir(), reason="no fixtures of the published U-ViT at NESTDIFF_SHARED")
@pytest.mark.parametrize("width", [48, 49, 512])
def test_timestep_embedding_is_the_published_one(width):
    """Even and odd widths agree with the published embedding, t up to 1000, but for the last bit of a frequency, in
    which CPUs differ."""
    published = torch.load(PARITY / "timestep_embedding.pt", weights_only=True)
    found, last_bit = timestep_embedding(published["t"], width), 1000 * 2.0**-23
    torch.testing.assert_close(found, published[f"dim{width}"], rtol=0, atol=last_bit)


def test_unpatchify_inverts_patches():
    """Cutting a latent into (p, p, C) patches row by row and putting them back gives the latent."""
    z = torch.randn(2, 3, 4, 6)
    patches = z.unfold(2, 2, 2).unfold(3, 2, 2)  # B C r c p q
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(tokens, 3, 2, 3, 2), z)


def test_patch_tokens_are_row_by_row():
    """Token r * columns + c reads the patch in row r, column c."""
    embed = PatchEmbed(1, 2, 8)
    z = torch.zeros(1, 1, 4, 6)
    z[0, 0, 2, 4] = 1.0  # row 1, column 2 of the 2 x 3 tokens
    changed = (embed(z) - embed(torch.zeros_like(z))).abs().sum(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 3 + 2]


def test_attention_agrees_with_its_formula():
    """softmax(q k^T / sqrt(d)) v per head, with qkv split as (3, heads, d)."""
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ attention.qkv.weight.T).reshape(2, 5, 3, 3, 4).unbind(2)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(2.0).softmax(-1)
    expected = attention.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected)


def test_sincos_similarity_depends_on_the_offset_only():
    """The inner product of two positions is the same for every pair of tokens that lie equally far apart."""
    p = sincos_positions(6, 6, 32)[0].reshape(6, 6, 32)
    similarity = torch.einsum("ijd,kld->ijkl", p, p)
    torch.testing.assert_close(similarity[0, 0, 2, 1], similarity[3, 4, 5, 5])
    assert not torch.allclose(p[1, 2], p[2, 1])
    assert similarity[2, 2].flatten().argmax() == 2 * 6 + 2


def test_sincos_puts_a_coarse_token_in_the_middle_of_what_it_covers():
    """A one-token grid spread over 2 x 2 tokens is equally similar to all four."""
    fine, coarse = sincos_positions(2, 2, 32)[0], sincos_positions(1, 1, 32, spacing=2.0)[0, 0]
    similarity = fine @ coarse
    torch.testing.assert_close(similarity, similarity[:1].expand(4))


def test_attention_that_learns_on_a_cpu_is_made_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Its gradient takes many times as long in bfloat16 there; without a gradient bfloat16 is faster. What
    leaves it is bfloat16 either way."""
    made, attention, x = [], Attention(16, 2), torch.randn(2, 5, 16)
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: made.append(qkv[0].dtype) or attend(*qkv))
    with torch.autocast("cpu", torch.bfloat16):
        learning = attention(x)
        with torch.no_grad():
            sampling = attention(x)
    assert made == [torch.float32, torch.bfloat16]
    assert learning.dtype == sampling.dtype == torch.bfloat16
    torch.testing.assert_close(learning, sampling, rtol=0.02, atol=0.01)
