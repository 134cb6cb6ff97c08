"""The noise of images, against noise that was added to real ones."""

import numpy as np
import pytest

from visbio_diffusers.data.noise import estimate_noise_std


@pytest.mark.parametrize("shape", [(400, 400), (300, 200, 3)])
def test_noise_alone_is_measured_exactly(shape):
    noise = 0.5 + 0.1 * np.random.default_rng(0).standard_normal(shape)
    pixels = (255 * noise).round().clip(0, 255).astype(np.uint8)
    assert estimate_noise_std(pixels) == pytest.approx(0.1, rel=0.02)


def test_shades_are_no_noise():
    shades = np.add.outer(np.arange(64), 2 * np.arange(64)).astype(np.uint8)
    assert estimate_noise_std(shades) < 1e-9


def test_real_cells(visbio_data):
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        images = real["test_images"][:50]
    rng, found = np.random.default_rng(0), {}
    for noise in (0.0, 0.05, 0.1):
        noisy = (images + 255 * noise * rng.standard_normal(images.shape)).round().clip(0, 255).astype(np.uint8)
        found[noise] = np.mean([estimate_noise_std(image) for image in noisy])
    assert found[0.0] < 0.02
    assert found[0.05] == pytest.approx(0.05, abs=0.006) and found[0.1] == pytest.approx(0.1, abs=0.01)
