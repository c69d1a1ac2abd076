"""Configuration: validation names the setting, plain data goes both ways, YAML overrides do what they say."""

import contextlib
import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestdiff_core import config as module
from nestdiff_core.config import ExperimentConfig, FeaturesConfig, LevelConfig, SamplingConfig, TrainConfig
from nestdiff_core.config_io import deciding, from_dict, to_dict
from nestdiff_core.errors import ConfigError
from nestdiff_core.recipes import RECIPES, load_experiment, save_experiment, toy


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """A recipe survives the way to plain data, to a file, and back."""
    config = RECIPES[name]()
    assert from_dict(ExperimentConfig, to_dict(config)) == config
    assert load_experiment(save_experiment(config, tmp_path)) == config


def test_every_knob_is_documented() -> None:
    """Each field of each config class carries the sentence that the launchpad shows."""
    classes = [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    assert len(classes) >= 14
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert field.metadata["doc"].rstrip(")").endswith("."), f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("change", "key", "level"),
    [
        ({"levels": [{"level": 1}, {"level": 3}]}, "levels", None),
        ({"levels": [{"level": 2}, {"level": 1}]}, "levels", None),
        ({"levels": []}, "levels", None),
        ({"levels": {2: {"grid": 5}}}, "levels.grid", 2),  # the feature map is 4x4
        ({"levels": {2: {"channels": 17}}}, "levels.channels", 2),  # the encoder has 16
        ({"levels": {2: {"patch_size": 3}}}, "levels.patch_size", 2),
        ({"levels": {1: {"patch_size": 8}}}, "levels.patch_size", 1),  # 64 values in 32 channels cannot carry noise
        ({"levels": {1: {"grid": 4}}}, "levels.grid", 1),  # the image is 8x8
        ({"levels": {1: {"model": {"num_heads": 0}}}}, "levels.model.num_heads", None),
        ({"levels": {1: {"train": {"lr": -1}}}}, "levels.train.lr", None),
        ({"levels": {1: {"train": {"beta2": 1.0}}}}, "levels.train.beta2", None),
        ({"levels": {1: {"train": {"noise_levels": (1.0, 0.0)}}}}, "levels.train.noise_levels", None),
        ({"levels": {1: {"train": {"noise_levels": (1.0,)}}}}, "levels.train.noise_levels", None),
        ({"levels": {1: {"train": {"condition_drop": 0.0}}}}, "levels.train.condition_drop", 1),  # it is guided
        ({"levels": [{}, {"grid": 2, "channels": 4}, {"grid": 2, "channels": 4}]}, "levels.grid", 3),  # a copy
        ({"levels": {2: {"guidance_interval": [0.9, 0.1]}}}, "levels.guidance_interval", 2),
        ({"encoder": {"vit": {"patch_size": 0}}}, "encoder.vit.patch_size", None),
        ({"evaluation": {"num_neighbours": 0}}, "evaluation.num_neighbours", None),
        ({"encoder": {"std": [0.0]}}, "encoder.std", None),
        (
            {"autoencoder": {"kind": "taef2", "weights": "w"}, "levels": {1: {"patch_size": 1}}},
            "autoencoder.channels",
            None,
        ),
        ({"autoencoder": {"kind": "kl", "weights": "w", "channels": 1}}, "levels.patch_size", 1),  # the code is 1x1
        ({"conditioning": {"labels": "class"}, "sampling": {"null_branch": "conditions"}}, "sampling.null_branch", 1),
        ({"search": {"level": 2, "metric": "fid"}}, "search.metric", None),
        ({"levels": [{}, {"grid": 1, "channels": 4}, {"grid": 2, "channels": 4}]}, "levels.grid", 3),  # grows upwards
        ({"levels": {3: {"grid": 1}}}, "levels.3", 3),
        ({"images": {"source": "folder"}}, "images.path", None),
        ({"images": {"labels": False}}, "evaluation.probe", None),
        ({"images": {"labels": "yes"}}, "images.labels", None),
        ({"sampling": {"num_images": 0}}, "sampling.num_images", None),
        ({"sampling": {"num_imges": 5}}, "sampling.num_imges", None),
        ({"sampling": {"sampler": "euler"}}, "sampling.sampler", None),
        ({"sampling": 3}, "sampling", None),
        ({"evaluation": {"extractors": ["inception"]}}, "evaluation.inception_weights", None),
        ({"evaluation": {"extractors": []}}, "evaluation.extractors", None),
        ({"name": "my experiment"}, "name", None),
    ],
)
def test_refusals_name_the_setting(change: dict, key: str, level: int | None) -> None:
    """What cannot work is a ConfigError with the dotted name, the level, and both values."""
    with pytest.raises(ConfigError) as caught:
        from_dict(ExperimentConfig, change, base=toy())
    assert (caught.value.key, caught.value.level) == (key, level)
    assert caught.value.code == 2 and caught.value.fix


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@settings(deadline=None)
def test_any_data_is_a_config_or_a_config_error(data: object) -> None:
    """Whatever a YAML file holds, the answer is a configuration or a ConfigError."""
    for name in typing.get_type_hints(ExperimentConfig):
        with contextlib.suppress(ConfigError):
            from_dict(ExperimentConfig, {name: data}, base=toy())


def test_yaml_overrides(tmp_path: Path) -> None:
    """Dotted and nested settings reach their place, siblings stay, and the file names the experiment."""
    path = write(
        tmp_path / "my-run.yaml",
        "recipe: toy\nsampling.num_images: 7\nlevels.2.condition_noise: 0.25\nsampling: {seed: 3}\n",
    )
    config = load_experiment(path)
    assert config.sampling == dataclasses.replace(toy().sampling, num_images=7, seed=3)
    assert config.level(2) == dataclasses.replace(toy().level(2), condition_noise=0.25)
    assert (config.level(1), config.name) == (toy().level(1), "my_run")


def test_yaml_level_list_replaces_the_levels(tmp_path: Path) -> None:
    """A list says which levels there are; what an entry leaves out comes from the recipe's level of that number."""
    path = write(
        tmp_path / "a.yaml",
        "recipe: toy\nlevels:\n- level: 1\n- level: 2\n  channels: 8\n- level: 3\n  grid: 1\n  train.num_steps: 5\n",
    )
    config = load_experiment(path)
    assert config.num_levels == 3
    assert config.level(2).channels == 8 and config.level(2).grid == toy().level(2).grid
    assert config.level(3).train == dataclasses.replace(toy().level(2).train, num_steps=5)


def test_yaml_number_formats(tmp_path: Path) -> None:
    """1e-3, which YAML reads as text, is a number; so is .inf where it may be."""
    path = write(tmp_path / "a.yaml", "recipe: toy\nlevels.1.train.lr: 1e-3\nsampling.noise_gamma: .inf\n")
    config = load_experiment(path)
    assert config.level(1).train.lr == 0.001
    assert config.sampling.noise_gamma == float("inf")


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "recipe: nope", "sampling: {seed: 1}\nsampling.seed: 2", "images.path: 3", "\0"]
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    """A file that cannot be used is a ConfigError that names the file."""
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert caught.value.path == str(path)


def test_unknown_recipe_suggests_the_nearest() -> None:
    """A misspelt recipe is answered with the right spelling."""
    with pytest.raises(ConfigError, match="digits"):
        load_experiment("digit")


def test_image_path_is_relative_to_the_file(tmp_path: Path) -> None:
    """`path: photos` in experiments/x.yaml means experiments/photos, wherever the command runs."""
    path = write(tmp_path / "x.yaml", "recipe: toy\nimages: {source: folder, path: photos}\n")
    assert load_experiment(path).images.path == str(tmp_path / "photos")


def test_a_url_is_relative_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "remote.yaml"
    path.write_text("recipe: images64_small\nimages: {source: webdataset, path: 's3://bucket/train-{00..12}.tar'}\n")
    assert load_experiment(path).images.path == "s3://bucket/train-{00..12}.tar"


def test_conditions_of_a_level() -> None:
    """all_above lists every level above from the top; markov only the next one; the top has none."""
    config = dataclasses.replace(toy(), levels=(*toy().levels, LevelConfig(level=3, grid=1, channels=4)))
    assert [config.levels_above(level) for level in (1, 2, 3)] == [(3, 2), (3,), ()]
    markov = dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, levels="markov"))
    assert [markov.levels_above(level) for level in (1, 2, 3)] == [(2,), (3,), ()]


def test_configs_cannot_be_changed() -> None:
    """A configuration is a value: changing one in place is refused."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_only_what_decides_results_is_in_fingerprints() -> None:
    """A knob says whether it decides: never, always, or only where it is not at its default."""
    assert deciding(FeaturesConfig(keep=False)) == deciding(FeaturesConfig())
    assert "compile" not in deciding(FeaturesConfig()) and deciding(FeaturesConfig(compile=True))["compile"] is True
    assert deciding(TrainConfig(log_every=7, checkpoint_every=8, keep_last=9)) == deciding(TrainConfig())
    assert deciding(TrainConfig(lr=1.0))["lr"] == 1.0
