"""The classifier that judges: it learns, its file is a judge's, and a wrong file is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from nestdiff_core import loading, stages
from nestdiff_core.config import EncoderConfig, JudgeConfig
from nestdiff_core.encoders import build_judge
from nestdiff_core.encoders.classifier import ClassifierTraining, accuracy, shifted, train_classifier
from nestdiff_core.encoders.convnet import Classifier
from nestdiff_core.encoders.moco import labelled_batches
from nestdiff_core.errors import ConfigError, IntegrityError, NumericsError
from nestdiff_core.experiment import Experiment
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.recipes import digits

NETWORK = EncoderConfig(kind="torchvision", name="shufflenet_v2_x0_5", weights="random", layer="conv5", input_size=32)
TRAINING = ClassifierTraining(num_steps=60, batch_size=64, lr=0.02, horizontal_flip=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    x = Experiment(digits(), tmp_path_factory.mktemp("artifacts"))
    stages.images(x)
    return loading.open_index(x)


@pytest.fixture(scope="module")
def trained(index: ImageIndex) -> Classifier:
    return train_classifier(NETWORK, 10, labelled_batches(index, 64, 0), TRAINING)[0]


@pytest.fixture(scope="module")
def judge(trained: Classifier, tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    """The configuration of a judge of the trained network's file."""
    path = tmp_path_factory.mktemp("judge") / "digits.safetensors"
    safetensors.torch.save_file(trained.get_submodule("network").state_dict(), path)
    return dataclasses.replace(NETWORK, weights=str(path))


def test_it_learns(trained: Classifier, index: ImageIndex) -> None:
    """After 60 steps it knows far more held-out digits than chance, which is a tenth; untrained it does not."""
    untrained = dataclasses.replace(TRAINING, num_steps=0)
    assert accuracy(trained, index) > 0.4
    assert accuracy(train_classifier(NETWORK, 10, labelled_batches(index, 64, 0), untrained)[0], index) < 0.3


def test_its_file_is_a_judges(trained: Classifier, judge: EncoderConfig, index: ImageIndex) -> None:
    """The file gives the same vectors and logits, those of torchvision's own class with these weights; without
    `num_classes` the same vectors, and no head."""
    _, images = next(index.iterate("held_out", 16))
    again = build_judge(judge, num_classes=10)
    assert isinstance(again, Classifier)
    vectors, logits = again.classify(images)
    torch.testing.assert_close((vectors, logits), trained.classify(images))
    whole = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    whole.load_state_dict(safetensors.torch.load_file(judge.weights))
    with torch.no_grad():
        torch.testing.assert_close(logits, whole(again.prepare(images)))
    plain = build_judge(judge)
    assert not isinstance(plain, Classifier)
    torch.testing.assert_close(plain.encode(images)[1], vectors)


@pytest.mark.parametrize("change", ["cut", "another network", "another head", "no head"])
def test_wrong_files_are_refused(judge: EncoderConfig, tmp_path: Path, change: str) -> None:
    """A file that is cut, or of other weights than the network with this head has: exit code 4."""
    path, state = tmp_path / "wrong.safetensors", safetensors.torch.load_file(judge.weights)
    match change:
        case "cut":
            path.write_bytes(Path(judge.weights).read_bytes()[:-1000])
        case "another network":
            safetensors.torch.save_file(torchvision.models.resnet18(num_classes=10).state_dict(), path)
        case "another head":
            safetensors.torch.save_file({**state, "fc.weight": torch.zeros(7, 1024), "fc.bias": torch.zeros(7)}, path)
        case "no head":
            safetensors.torch.save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, path)
    with pytest.raises(IntegrityError) as caught:
        build_judge(dataclasses.replace(judge, weights=str(path)), num_classes=10)
    assert str(path) in str(caught.value)


def test_heads_that_tell_nothing_apart_are_refused(judge: EncoderConfig) -> None:
    """One class, an untrained head, and a network whose head is not read."""
    random = dataclasses.replace(judge, weights="random")
    moco = EncoderConfig(kind="moco", weights="folder")
    for num_classes, encoder in ((1, judge), (10, random), (10, moco)):
        with pytest.raises(ConfigError, match=r"judges\.num_classes"):
            JudgeConfig(name="cnn", encoder=encoder, num_classes=num_classes)


def test_the_same_seed_gives_the_same_bits(index: ImageIndex) -> None:
    """Two trainings agree in every weight; another seed differs."""
    short = dataclasses.replace(TRAINING, num_steps=2)
    runs = [
        train_classifier(NETWORK, 10, labelled_batches(index, 64, 0), dataclasses.replace(short, seed=seed))[0]
        for seed in (3, 3, 4)
    ]
    first, same, other = (run.state_dict() for run in runs)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["network.fc.weight"], other["network.fc.weight"])


def test_a_loss_that_is_not_finite_stops(index: ImageIndex) -> None:
    """Exit code 6, with the step."""
    wild = dataclasses.replace(TRAINING, lr=1e30)
    with pytest.raises(NumericsError, match="step"):
        train_classifier(NETWORK, 10, labelled_batches(index, 64, 0), wild)


def test_images_move_by_whole_pixels() -> None:
    """Every image is a window of itself with its border mirrored, all shifts and both directions appear; without
    shift and flip it stays."""
    side, most = 8, 2
    one = np.arange(side * side, dtype=np.uint8).reshape(side, side, 1)
    padded = np.pad(one, ((most, most), (most, most), (0, 0)), mode="reflect")
    windows = {
        padded[i : i + side, j : j + side][:, ::turn].tobytes(): (i, j, turn)
        for i in range(2 * most + 1)
        for j in range(2 * most + 1)
        for turn in (1, -1)
    }
    images, generator = torch.from_numpy(one).expand(2000, -1, -1, -1), torch.Generator().manual_seed(0)
    training = ClassifierTraining(num_steps=1, shift=most / side)
    found = shifted(images, training, generator)
    assert {windows[image.numpy().tobytes()] for image in found} == set(windows.values())
    still = ClassifierTraining(num_steps=1, shift=0.0, horizontal_flip=False)
    assert torch.equal(shifted(images, still, generator), images)


def test_labels_stay_with_their_images(index: ImageIndex) -> None:
    """Over two epochs and a batch that spans them, each image comes with its own class."""
    known = {
        image.tobytes(): int(index.labels[row])
        for rows, images in index.iterate("train")
        for row, image in zip(rows, images, strict=True)
    }
    batches = labelled_batches(index, 500, 0, pool_bytes=1)
    for _ in range(6):
        images, labels = next(batches)
        assert [known[image.tobytes()] for image in images] == labels.tolist()
