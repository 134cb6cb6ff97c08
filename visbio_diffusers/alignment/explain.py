"""Why one caption and not the next: the places of an image, and the words, that decided between the two."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from visbio_diffusers.alignment.dual_encoder import DualEncoder
from visbio_diffusers.grid import contact_sheet, tint


PLACES = 9  # in each direction
COVER = 0.25  # side of what is covered at once, of the image


@torch.no_grad()
def deciding_places(encoder: DualEncoder, image: np.ndarray, winner: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Return how much each place of an image speaks for the winner: what its lead loses when the place is covered.

    Args:
        encoder (`DualEncoder`): looks at the image, once for each place.
        image (`np.ndarray` of shape `(height, width, 3)`): uint8, square.
        winner, other (`torch.Tensor` of shape `(width,)`): embeds of the two captions.

    Returns:
        float32 of shape `(9, 9)`, in cosine; negative where a place speaks for the other.

    Source: Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.1.
    """
    side = len(image)
    width = max(round(side * COVER), 1)
    starts = np.linspace(0, side - width, PLACES).round().astype(int)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    covered = [image]
    for top in starts:
        for left in starts:
            covered.append(image.copy())
            covered[-1][top : top + width, left : left + width] = np.median(border, axis=0)
    lead = encoder.embed_images(covered) @ (winner - other)
    return (lead[0] - lead[1:]).view(PLACES, PLACES).numpy()


def deciding_words(encoder: DualEncoder, image_embed: torch.Tensor, caption: str) -> list[tuple[str, float]]:
    """Return each word of a caption with how much of the cosine to the image is lost without it."""
    words = caption.split()
    if len(words) == 1:
        return [(caption, 1.0)]
    texts = [caption, *(" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))]
    cosines = encoder.embed_texts(texts) @ image_embed
    return [(word, float(cosines[0] - cosine)) for word, cosine in zip(words, cosines[1:], strict=True)]


def explanation_picture(image: np.ndarray, places: np.ndarray, winner: str, other: str) -> Image.Image:
    """Return the image beside itself with the places that speak for the winner in red and for the other in blue."""
    strength = places / max(float(np.abs(places).max()), 1e-6)
    heat = np.asarray(Image.fromarray(strength.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
    grey = Image.fromarray(image).convert("L").resize((224, 224), Image.Resampling.NEAREST)
    shown = [Image.fromarray(image), tint(grey, np.clip(heat, -1, 1))]
    captions = ["what was looked at", f"red: for {winner}; blue: for {other}"]
    return contact_sheet(shown, captions, columns=2, tile=224, caption_lines=5)
