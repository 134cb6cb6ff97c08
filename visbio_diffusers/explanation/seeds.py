"""What the seed decides and what the words decide: spread over seeds, and pairs that share a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def stack(images: Sequence[Image.Image]) -> np.ndarray:
    """Return images of one size as grey levels, float64 of shape `(n, height, width, channels)`."""
    return np.stack([np.asarray(image, np.float64).reshape(image.height, image.width, -1) for image in images])


def pixel_std(images: Sequence[Image.Image]) -> np.ndarray:
    """Return how much each pixel varies over images of one prompt and several seeds, `(height, width)`.

    In grey levels: the root of the unbiased variance over images, as a mean over channels.

    Raises:
        ValueError: for fewer than two images.
    """
    if len(images) < 2:
        raise ValueError("one image does not vary: draw two seeds or more")
    return np.sqrt(stack(images).var(axis=0, ddof=1).mean(axis=-1))


def pixel_differences(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> np.ndarray:
    """Return how far images are from their counterparts at each pixel, `(n, height, width)`.

    In grey levels: the root of the mean square over channels. Two images of different seeds are, on average over
    pairs, root 2 times [`pixel_std`] apart, which is what to compare with.

    Args:
        images, others (`Sequence[PIL.Image.Image]`): of the same seeds, in the same order, from two prompts.
    """
    return np.sqrt(np.square(stack(images) - stack(others)).mean(axis=-1))
