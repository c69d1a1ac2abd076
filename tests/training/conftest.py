"""Batches that the tests of training share, and the state that an undisturbed run ends in."""

import pytest
from small import NUM_IMAGES, make_batches, state_hash, trainer

from nestdiff_core.training.data import LatentBatches


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> LatentBatches:
    return make_batches(tmp_path_factory.mktemp("latents"), NUM_IMAGES)


@pytest.fixture(scope="module")
def uninterrupted(batches: LatentBatches, tmp_path_factory: pytest.TempPathFactory) -> str:
    whole = trainer(batches, tmp_path_factory.mktemp("whole"))
    whole.run()
    return state_hash(whole)
