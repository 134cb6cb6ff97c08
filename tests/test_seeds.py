"""Spread over seeds, and differences of pairs."""

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers.explanation.seeds import pixel_differences, pixel_std


def images(seed, count=5, shape=(6, 4, 3)):
    values = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return values, [Image.fromarray(each) for each in values]


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4)])
def test_std_by_hand(shape):
    values, pictures = images(0, shape=shape)
    expected = values.astype(float).reshape(5, 6, 4, -1).std(axis=0, ddof=1)
    np.testing.assert_allclose(pixel_std(pictures), np.sqrt((expected**2).mean(axis=-1)))


def test_all_pairs_are_on_average_root_two_of_the_std_apart():
    _, pictures = images(0)
    pairs = [(a, b) for k, a in enumerate(pictures) for b in pictures[:k]]
    squares = np.square(pixel_differences(*zip(*pairs))).mean(axis=0)
    np.testing.assert_allclose(np.sqrt(squares), np.sqrt(2) * pixel_std(pictures))


def test_equal_pairs_do_not_differ_and_one_image_does_not_vary():
    _, pictures = images(0)
    assert pixel_differences(pictures, pictures).shape == (5, 6, 4)
    assert not pixel_differences(pictures, pictures).any()
    with pytest.raises(ValueError, match="draw two seeds or more"):
        pixel_std(pictures[:1])
