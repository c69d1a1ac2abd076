"""The denoiser of one level."""

import dataclasses

import pytest
import torch

from nestdiff_core.config import ConditioningConfig, ExperimentConfig, LevelConfig, UViTConfig
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.models import LatentTokens, NestedDenoiser, UViT, build_denoiser, count_macs
from nestdiff_core.recipes import digits

CONFIG = UViTConfig(width=16, depth=2, num_heads=2)
LATENT = LatentTokens((3, 4, 4), 2)
ABOVE = {2: LatentTokens((5, 4, 4), 2), 3: LatentTokens((6, 1, 1), 1)}


def denoiser(*, above=ABOVE, num_classes=4, config=CONFIG, **options):
    generator = torch.Generator().manual_seed(0)
    return NestedDenoiser(1, LATENT, above, config, num_classes=num_classes, generator=generator, **options)


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    z_above = {m: torch.randn(batch, *latent.shape, generator=generator) for m, latent in ABOVE.items()}
    labels = torch.arange(batch)
    return (
        torch.randn(batch, *LATENT.shape, generator=generator),
        torch.rand(batch, generator=generator),
        z_above,
        labels,
    )


def test_without_conditions_it_is_the_published_network():
    """With the same weights, D_L(z, t) is U-ViT(z, 1000 t)."""
    own, uvit = denoiser(above={}, num_classes=0), UViT(LATENT.shape, LATENT.patch_size, CONFIG)
    uvit.load_state_dict(own.state_dict())
    z, t, _, _ = inputs()
    torch.testing.assert_close(own(z, t, {}), uvit(z, 1000 * t))


def test_with_classes_or_captions_it_is_the_published_network():
    """Label and caption tokens stand where the published network has them: its weights can be a start."""
    z, t, _, labels = inputs()
    captions = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    pairs = [
        (denoiser(above={}), UViT(LATENT.shape, 2, CONFIG, num_classes=5), labels),
        (
            denoiser(above={}, num_classes=0, text=(7, 6)),
            UViT(LATENT.shape, 2, CONFIG, context_dim=6, num_context=7),
            captions,
        ),
    ]
    for own, uvit, condition in pairs:
        uvit.load_state_dict({k: v for k, v in own.state_dict().items() if k != "null_context"})
        torch.testing.assert_close(own(z, t, {}, condition), uvit(z, 1000 * t, condition))


def test_tokens_run_from_abstract_to_concrete():
    """[label | time | z_3 | z_2 | z_1]: each input changes its own tokens only."""
    model, (z, t, z_above, labels) = denoiser(), inputs()
    seen = []
    model.transform = lambda tokens: seen.append(tokens) or tokens
    groups = {
        (0, 1): (z, t, z_above, labels.roll(1)),
        (1, 2): (z, t * 0.5, z_above, labels),
        (2, 3): (z, t, z_above | {3: z_above[3] + 1}, labels),
        (3, 7): (z, t, z_above | {2: z_above[2] + 1}, labels),
        (7, 11): (z + 1, t, z_above, labels),
    }
    model(z, t, z_above, labels)
    assert seen[0].shape[1] == model.num_tokens == 11
    for (start, stop), changed in groups.items():
        model(*changed)
        differing = (seen[-1] - seen[0]).abs().sum((0, 2)).nonzero().flatten().tolist()
        assert differing == list(range(start, stop))


@pytest.mark.parametrize("injection", ["tokens", "fusion"])
def test_published_weights_are_a_start(injection):
    """Everything but the way of the conditions comes from them; without conditions it is then the published network."""
    uvit = UViT(LATENT.shape, 2, CONFIG, num_classes=5, generator=torch.Generator().manual_seed(7))
    model, (z, t, _, labels) = denoiser(injection=injection), inputs()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.start_from(uvit.state_dict())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(k.startswith(("conditions", "fusion")) for k in changed)
    bare = denoiser(above={})
    bare.start_from(uvit.state_dict())
    torch.testing.assert_close(bare(z, t, {}, labels), uvit(z, 1000 * t, labels))
    with pytest.raises(IntegrityError, match=r"level 1.*expected \(5, 16\), found \(9, 16\)"):
        model.start_from(UViT(LATENT.shape, 2, CONFIG, num_classes=9).state_dict())


@pytest.mark.parametrize("injection", ["tokens", "fusion"])
def test_every_input_matters(injection):
    """The output depends on time, label, each condition and the noised latent."""
    model, (z, t, z_above, labels) = denoiser(injection=injection), inputs()
    for tensor in (z, t, *z_above.values()):
        tensor.requires_grad_()
    model(z, t, z_above, labels).square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (z, t, *z_above.values(), model.label_emb.weight))


@pytest.mark.parametrize("injection", ["tokens", "fusion"])
def test_a_dropped_sample_sees_neither_conditions_nor_label(injection):
    """Dropping hides every condition and the label of that sample, and changes no other sample."""
    model, (z, t, z_above, labels) = denoiser(injection=injection), inputs()
    drop = torch.tensor([True, False, False])
    out = model(z, t, z_above, labels, drop)
    others = model(z, t, {m: z_m.roll(1, 0) for m, z_m in z_above.items()}, labels.roll(1), drop)
    torch.testing.assert_close(out[0], others[0])
    assert not torch.allclose(out[1:], others[1:])
    torch.testing.assert_close(out[1:], model(z, t, z_above, labels)[1:])
    assert not torch.allclose(out[0], model(z, t, z_above, labels)[0])


@pytest.mark.parametrize("injection", ["tokens", "fusion"])
def test_conditions_are_dropped_one_by_one(injection):
    """A mapping of masks hides the named conditions of the named samples and no other."""
    model, (z, t, z_above, labels) = denoiser(injection=injection), inputs()
    every = torch.ones(3, dtype=torch.bool)
    for hidden, changed in {
        "labels": (z_above, labels.roll(1)),
        2: (z_above | {2: z_above[2] + 1}, labels),
        3: (z_above | {3: z_above[3] + 1}, labels),
    }.items():
        out = model(z, t, z_above, labels, {hidden: every})
        torch.testing.assert_close(model(z, t, *changed, {hidden: every}), out)
        others = {name: every for name in ("labels", 2, 3) if name != hidden}
        assert not torch.allclose(model(z, t, *changed, others), model(z, t, z_above, labels, others))
    together = model(z, t, z_above, labels, every)
    torch.testing.assert_close(model(z, t, z_above, labels, dict.fromkeys(("labels", 2, 3), every)), together)


def test_the_empty_caption_is_the_null_caption():
    """No captions, dropped captions and the given empty caption are one thing."""
    model, (z, t, _, _) = denoiser(above={}, num_classes=0, text=(7, 6)), inputs()
    empty, captions = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(2)), torch.ones(3, 7, 6)
    model.null_context.copy_(empty[:1])
    null = model(z, t, {})
    torch.testing.assert_close(model(z, t, {}, empty[:1].expand(3, -1, -1)), null)
    torch.testing.assert_close(model(z, t, {}, captions, torch.ones(3, dtype=torch.bool)), null)
    assert not torch.allclose(model(z, t, {}, captions), null)


def test_the_null_class_is_the_last_row():
    """No labels, dropped labels and the last row of the table are one thing."""
    model, (z, t, _, labels) = denoiser(above={}), inputs()
    null = torch.full_like(labels, 4)
    assert model.label_emb.num_embeddings == 5
    torch.testing.assert_close(model(z, t, {}), model(z, t, {}, null))
    torch.testing.assert_close(model(z, t, {}), model(z, t, {}, labels, torch.ones(3, dtype=torch.bool)))


@pytest.mark.parametrize("injection", ["tokens", "fusion"])
def test_training_with_drops_reaches_every_parameter(injection):
    """A batch with and without drops leaves no parameter without a gradient (DDP waits for all of them)."""
    model, (z, t, z_above, labels) = denoiser(injection=injection), inputs()
    model(z, t, z_above, labels, torch.tensor([True, False, False])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("levels", [(), (3,), (2, 3, 4)])
def test_wrong_conditions_are_named(levels):
    """The refusal names the level, the levels it reads, and the levels that came."""
    z, t, z_above, labels = inputs()
    with pytest.raises(ConfigError) as refusal:
        denoiser()(z, t, {m: z_above.get(m, z_above[3]) for m in levels}, labels)
    error = refusal.value
    assert (error.level, error.expected, error.found) == (1, [3, 2], sorted(levels, reverse=True))


def test_labels_without_a_table_are_refused():
    """An unconditional denoiser says that it takes no labels."""
    z, t, _, labels = inputs()
    with pytest.raises(ConfigError, match="takes no labels"):
        denoiser(above={}, num_classes=0)(z, t, {}, labels)


def test_macs_agree_with_a_hand_count():
    """Every product of a denoiser with two conditions and a label."""
    d, own, above_2, above_3 = 16, 4, 4, 1
    tokens = 2 + own + above_2 + above_3
    block = 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * 4 * d
    embeddings = own * 12 * d + above_2 * 20 * d + above_3 * 6 * d
    by_hand = embeddings + 3 * block + tokens * 2 * d * d + own * d * 12 + 16 * 3 * 3 * 9
    assert count_macs(denoiser()) == by_hand


def test_five_levels_cost_what_the_paper_prints():
    """cvpr, L=5: 34.0 GFlops printed, 33.93 to 33.96 counted for the sum of all levels."""
    shapes = {1: (4, 32, 32, 2), 2: (32, 8, 8, 2), 3: (64, 4, 4, 2), 4: (128, 2, 2, 1), 5: (256, 1, 1, 1)}
    latents = {m: LatentTokens((c, h, w), patch) for m, (c, h, w, patch) in shapes.items()}
    total = 0
    for level in shapes:
        above = {m: latents[m] for m in shapes if m > level}
        with torch.device("meta"):
            total += count_macs(
                NestedDenoiser(level, latents[level], above, UViTConfig(width=768, depth=12, num_heads=12))
            )
    assert 33.9 <= total / 1e9 <= 34.0


def experiment(conditioning="all_above", labels="none"):
    config = digits()
    levels = [*config.levels, dataclasses.replace(config.levels[-1], level=4, channels=8)]
    return dataclasses.replace(
        config, levels=tuple(levels), conditioning=ConditioningConfig(levels=conditioning, labels=labels)
    )


@pytest.mark.parametrize(("conditioning", "read"), [("all_above", (4, 3, 2)), ("markov", (2,))])
def test_build_denoiser_follows_the_experiment(conditioning, read):
    """Shapes, conditions and output of a built denoiser are those of the configuration."""
    config = experiment(conditioning)
    model = build_denoiser(config, 1, 0)
    assert model.levels_above == read
    z, t, z_above, _, _ = model.example_inputs(2, "cpu")
    assert z.shape[1:] == config.latent_shape(1)
    assert {m: tuple(z_m.shape[1:]) for m, z_m in z_above.items()} == {m: config.latent_shape(m) for m in read}
    assert model(z, t, z_above).shape == z.shape


def test_build_denoiser_refuses_a_contradicting_number_of_classes():
    """conditioning.labels decides whether there is a label token."""
    assert build_denoiser(experiment(labels="class"), 4, 10).label_emb.num_embeddings == 11
    with pytest.raises(ConfigError, match="number of classes"):
        build_denoiser(experiment(), 4, 10)
    with pytest.raises(ConfigError, match="number of classes"):
        build_denoiser(experiment(labels="class"), 4, 0)


def test_weights_do_not_know_level_numbers():
    """A level inserted below gives a denoiser another number and the same parameters."""
    config = experiment()
    inserted = LevelConfig(level=2, grid=4, channels=8, model=config.levels[0].model)
    renumbered = [dataclasses.replace(level, level=level.level + 1) for level in config.levels[1:]]
    deeper = ExperimentConfig(
        images=config.images, encoder=config.encoder, levels=(config.levels[0], inserted, *renumbered)
    )
    before, after = build_denoiser(config, 2, 0), build_denoiser(deeper, 3, 0)
    after.load_state_dict(before.state_dict())
    z, t, z_above, _, _ = before.example_inputs(2, "cpu")
    z_above = {m: torch.randn_like(z_m) for m, z_m in z_above.items()}
    assert torch.equal(before(z, t, z_above), after(z, t, {m + 1: z_m for m, z_m in z_above.items()}))


@pytest.mark.parametrize("position_init", ["learned", "sincos"])
def test_the_generator_decides_the_initialisation(position_init):
    """The same generator seed gives the same weights, another seed others; positions start as configured."""
    config = dataclasses.replace(CONFIG, position_init=position_init)
    a, b, c = (
        NestedDenoiser(1, LATENT, ABOVE, config, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["mid_block.mlp.fc1.weight"], c["mid_block.mlp.fc1.weight"])
    rms = a["pos_embed"][:, -4:].square().mean().sqrt().item()
    assert rms == pytest.approx({"learned": 0.02, "sincos": 0.5**0.5}[position_init], rel=0.3)
    fresh = {name: p for name, p in a.items() if name.startswith("conditions") and not p.any()}
    assert fresh == {}


def test_xavier_begins_with_variance_kept_and_no_condition_added():
    """Linear weights are spread by fan-in and fan-out; fusion changes no token before its first step, and learns."""
    config = dataclasses.replace(CONFIG, weight_init="xavier")
    model = denoiser(config=config, injection="fusion")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.any():
            variance = 2.0 / (layer.in_features + layer.out_features)
            error = 6 * variance / layer.weight.numel() ** 0.5
            assert abs(layer.weight.var().item() - variance) < error, name
            assert layer.bias is None or not layer.bias.any()
    z, t, z_above, labels = inputs()
    other = {m: torch.randn_like(z_m) for m, z_m in z_above.items()}
    assert torch.equal(model(z, t, z_above, labels), model(z, t, other, labels))
    model(z, t, z_above, labels).square().mean().backward()
    assert all(mlp.fc2.weight.grad.any() for mlp in model.fusion.mlps)
