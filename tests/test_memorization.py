"""The audit finds planted copies, whatever was done to them, and finds none among images that nobody trained on."""

import numpy as np
import pytest

from visbio_diffusers.evaluation import memorization


SIZE = 16


def _blobs(seed, n):
    """Return smooth random colour images (n, SIZE, SIZE, 3), uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 220, size=(n, 6, 6, 3))
    return coarse.repeat(3, axis=1).repeat(3, axis=2)[:, 1 : SIZE + 1, 1 : SIZE + 1].astype(np.uint8)


def _moved(images):
    return np.roll(images, (1, -2), axis=(1, 2))


def _recoloured(images):
    return (255 - 0.6 * (255 - images.astype(float)) * [1.1, 0.9, 1.0]).clip(0, 255).astype(np.uint8)


DISGUISES = {
    "none": lambda images: images,
    "mirrored": lambda images: images[:, :, ::-1],
    "turned": lambda images: np.rot90(images, axes=(1, 2)),
    "moved": _moved,
    "recoloured": _recoloured,
    "all": lambda images: _recoloured(_moved(np.rot90(images[:, ::-1], axes=(1, 2)))),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_copy_is_traced_to_its_original(disguise):
    bank, unseen = _blobs(0, 80), _blobs(1, 80)
    correlations, rows = memorization.best_matches(np.ascontiguousarray(DISGUISES[disguise](bank[:20])), bank)
    others, _ = memorization.best_matches(unseen, bank)
    assert rows.tolist() == list(range(20))
    assert correlations.min() > 0.95 > others.max() + 0.05


def test_matches_do_not_depend_on_chunks_and_sizes_must_fit():
    bank, queries = _blobs(0, 30), _blobs(2, 21)
    whole, parts = (memorization.best_matches(queries, bank, chunk_size=size) for size in (64, 8))
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)
    assert whole[1].tolist() == parts[1].tolist()
    with pytest.raises(ValueError, match="one square size"):
        memorization.best_matches(queries[:, :10], bank)


def test_membership_auc_is_the_mann_whitney_statistic_with_an_interval():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 1, 200).round(1), rng.normal(0.5, 1, 150).round(1)
    entry = memorization.membership_auc(members, others)
    expected = stats.mannwhitneyu(others, members).statistic / (200 * 150)
    assert entry["value"] == pytest.approx(expected)
    assert entry["low"] < stats.norm.cdf(0.5 / np.sqrt(2)) < entry["high"] and entry["n"] == 350
    covered = 0
    for seed in range(100):
        a, b = np.random.default_rng(seed).normal(size=(2, 60))
        null = memorization.membership_auc(a, b)
        covered += null["low"] <= 0.5 <= null["high"]
    assert 89 <= covered <= 99  # 95 are expected
    with pytest.raises(ValueError, match="at least 2 images"):
        memorization.membership_auc(members[:1], others)


def test_denoising_losses_are_the_training_loss_and_repeatable(tiny_pipeline):
    size = tiny_pipeline.unet.config.sample_size
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, 3)).astype(np.uint8)
    prompts = ["a cell", "a monocyte", "a cell", "a small cell", "a platelet"]
    losses = memorization.denoising_losses(tiny_pipeline, images, prompts)
    again = memorization.denoising_losses(tiny_pipeline, images, prompts, batch_size=2)
    np.testing.assert_allclose(losses, again, rtol=1e-4)
    assert losses.shape == (5,) and (losses > 0).all()
    other = memorization.denoising_losses(tiny_pipeline, images, prompts, seed=9)
    assert not np.allclose(losses, other)
