"""The published U-ViT: weights, outputs, gradients, training steps, sizes."""

import json
import os
from pathlib import Path

import pytest
import torch

from nestdiff_core.config import UViTConfig
from nestdiff_core.diffusion import DiscreteSchedule, level_loss
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.models import UViT, count_macs, count_parameters, from_published

PARITY = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity"
needs_fixtures = pytest.mark.skipif(not PARITY.is_dir(), reason="no fixtures of the published U-ViT at NESTDIFF_SHARED")
SHAPE = (4, 32, 32)


def published(kind):
    meta = json.loads((PARITY / "meta.json").read_text())[kind]
    return meta, torch.load(PARITY / f"uvit_{kind}.pt", weights_only=True)


@needs_fixtures
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_published_weights_give_published_numbers(kind):
    """Output within 2e-6 of its largest value, gradient norms within 1e-4, and the same number of parameters."""
    meta, fixture = published(kind)
    module = from_published(meta["config"], fixture["state_dict"])
    assert count_parameters(module) == meta["n_params"]
    inputs = fixture["inputs"]
    output = module(inputs["x"], inputs["t"], *([inputs["y"]] if kind == "class" else []))
    assert (output - fixture["output"]).abs().max() <= 2e-6 * fixture["output"].abs().max()
    loss = output.square().mean()
    torch.testing.assert_close(loss, fixture["loss"], rtol=1e-6, atol=0)
    loss.backward()
    norms = {name: p.grad.norm() for name, p in module.named_parameters()}
    torch.testing.assert_close(norms, fixture["grad_norms"], rtol=1e-4, atol=0)


@needs_fixtures
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_initialisation_is_the_published_one(kind):
    """Mean and spread of every tensor agree with the published initialisation, up to the error of a sample."""
    meta, fixture = published(kind)
    c = meta["config"]
    config = UViTConfig(width=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"])
    module = UViT(
        (4, 8, 8), 2, config, num_classes=max(c["num_classes"], 0), generator=torch.Generator().manual_seed(0)
    )
    for name, (mean, std) in fixture["init_mean_std"].items():
        p = dict(module.named_parameters())[name].detach()
        if std == 0:
            assert torch.equal(p, torch.full_like(p, mean)), name
        else:
            error = 6 / p.numel() ** 0.5  # two samples are compared, each with its own error
            assert abs(p.mean() - mean) < error * std, name
            assert abs(p.std() / std - 1) < error, name


@needs_fixtures
def test_five_training_steps_are_the_published_ones():
    """Losses, final weights and EMA of five AdamW steps through `level_loss` agree with the published trainer."""
    meta, fixture = published("uncond")
    steps = torch.load(PARITY / "train5.pt", weights_only=True)
    module = from_published(meta["config"], fixture["state_dict"])
    ema = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.03, betas=(0.9, 0.9))
    losses = []
    for x0, eps, n, lr in zip(steps["x0"], steps["eps"], steps["n"], steps["lr"], strict=True):
        optimizer.param_groups[0]["lr"] = lr.item()
        loss = level_loss(
            lambda z, t, *_: module(z, t * 1000), DiscreteSchedule(), "eps", x0, {}, {}, n / 1000, eps, {}
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for name, p in module.named_parameters():
            ema[name].lerp_(p.detach(), 1e-4)
    torch.testing.assert_close(torch.stack(losses), steps["losses"], rtol=1e-5, atol=0)
    for kind, weights in {"final_sum": dict(module.named_parameters()), "ema_sum": ema}.items():
        for name, expected in steps[kind].items():
            total = weights[name].detach().double()
            assert abs(total.sum() - expected) < 1e-5 * total.abs().sum() + 1e-6, (kind, name)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "options", "conv", "total", "without_positions"),
    [
        pytest.param(512, 12, 8, {}, True, 44_259_492, 44_127_908, id="S"),
        pytest.param(768, 16, 12, {}, True, 130_122_404, 129_925_028, id="M"),
        pytest.param(768, 16, 12, {"num_classes": 1001}, True, 130_891_940, 130_693_796, id="M-class"),
        pytest.param(512, 12, 8, {"context_dim": 768, "num_context": 77}, True, 44.69e6, None, id="S-text"),
        pytest.param(512, 16, 8, {"context_dim": 768, "num_context": 77}, True, 58.35e6, None, id="S-deep-text"),
        pytest.param(768, 12, 12, {}, True, 99.42e6, None, id="cvpr-Mid"),
        pytest.param(1024, 20, 16, {"num_classes": 1001}, True, 286.8e6, None, id="L-class"),
        pytest.param(1152, 28, 16, {"num_classes": 1001}, False, 500.8e6, None, id="H-class"),
    ],
)
def test_parameter_counts_are_the_published_ones(width, depth, heads, options, conv, total, without_positions):
    """Published sizes on 32x32x4, patch 2 (arXiv 2209.12152); rounded ones to the digits printed."""
    with torch.device("meta"):
        module = UViT(SHAPE, 2, UViTConfig(width=width, depth=depth, num_heads=heads, final_conv=conv), **options)
    if without_positions is None:
        assert count_parameters(module) == pytest.approx(total, rel=2e-4)
    else:
        assert count_parameters(module) == total
        assert count_parameters(module) - module.pos_embed.numel() == without_positions


@pytest.mark.parametrize(("depth", "gmacs"), [(12, 26.79), (16, 35.08)])
def test_macs_are_the_printed_ones(depth, gmacs):
    """The cost column of the paper's one-level models: MACs with attention (arXiv 2412.05984)."""
    with torch.device("meta"):
        module = UViT(SHAPE, 2, UViTConfig(width=768, depth=depth, num_heads=12))
    assert round(count_macs(module) / 1e9, 2) == gmacs


def test_macs_agree_with_a_hand_count():
    """Every product of a small text network, counted by hand."""
    d, patches, text = 16, 9, 5
    tokens = 1 + text + patches
    block = 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * 4 * d
    by_hand = (
        patches * (3 * 2 * 2) * d  # patch embedding
        + text * 7 * d
        + 3 * block
        + tokens * 2 * d * d  # one long skip
        + patches * d * (2 * 2 * 3)
        + 6 * 6 * 3 * 3 * 9  # final convolution
    )
    module = UViT((3, 6, 6), 2, UViTConfig(width=d, depth=2, num_heads=2), context_dim=7, num_context=text)
    assert count_macs(module) == by_hand
    assert next(module.parameters()).device.type == "cpu"


PUBLISHED = {"img_size": 8, "patch_size": 2, "in_chans": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = UViTConfig(width=16, depth=2, num_heads=2)


def test_text_network_orders_its_tokens_time_text_patches():
    """A text token's position comes after the time token's, and patches after the text."""
    module = UViT((4, 8, 8), 2, CONFIG, context_dim=6, num_context=3)
    seen = {}
    module.transform = lambda tokens: seen.setdefault("tokens", tokens)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 3, 6)
    module(x, t, context)
    first = seen.pop("tokens")
    module(x, t, context + torch.tensor([0.0, 1.0, 0.0])[:, None])
    assert (seen.pop("tokens") - first).abs().sum(-1)[0].nonzero().flatten().tolist() == [2]
    module(x, t + 1, context)
    assert (seen.pop("tokens") - first).abs().sum(-1)[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("published_options", "own_options"),
    [
        pytest.param({"clip_dim": 6, "num_clip_token": 3}, {"context_dim": 6, "num_context": 3}, id="text"),
        pytest.param({"qkv_bias": True, "mlp_time_embed": True}, {"qkv_bias": True, "time_mlp": True}, id="biases"),
        pytest.param({"skip": False}, {"skip": False}, id="no-skip"),
    ],
)
def test_from_published_reads_every_option(published_options, own_options):
    """A network's weights and the published names of its options give the same network again."""
    original = UViT((4, 8, 8), 2, CONFIG, **own_options)
    again = from_published(PUBLISHED | published_options, original.state_dict())
    inputs = original.example_inputs(2, "cpu")
    assert torch.equal(again(*inputs), original(*inputs))


def test_from_published_refuses_what_does_not_fit():
    """Weights of another shape name the tensor; unknown settings are named."""
    weights = UViT((4, 8, 8), 2, CONFIG).state_dict()
    with pytest.raises(IntegrityError, match="label_emb"):
        from_published(PUBLISHED | {"num_classes": 3}, weights)
    with pytest.raises(ConfigError, match="depht"):
        from_published(PUBLISHED | {"depht": 4}, weights)
