"""What the page's first tab does: images of a prompt, where its words were read, and the nearest real images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from visbio_diffusers import generate
from visbio_diffusers.demo.models import (
    MAX_IMAGES,
    MAX_SEED,
    NO_ADAPTER,
    OWN_SCHEDULER,
    Models,
    Reference,
    check_prompt,
    check_whole,
    heard_warnings,
)
from visbio_diffusers.evaluation.memorization import nearest_distances
from visbio_diffusers.explanation.attribution import HEADS, attribute_words
from visbio_diffusers.explanation.report import word_sheet
from visbio_diffusers.grid import contact_sheet


TILE = 140  # pixels of the screen


class Drawing(NamedTuple):
    """Drawn images and what is said of them.

    Args:
        images (`list[PIL.Image.Image]`), records (`list[dict[str, str]]`): with the text chunks of their PNGs.
        word_maps (`PIL.Image.Image`, *optional*): where each word was read, a row for each image.
        neighbours (`PIL.Image.Image`, *optional*): the images above their nearest real ones.
        warnings (`list[str]`): such as that the prompt was cut.
    """

    images: list[Image.Image]
    records: list[dict[str, str]]
    word_maps: Image.Image | None
    neighbours: Image.Image | None
    warnings: list[str]


def draw_images(
    models: Models,
    prompt: str,
    num_images: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str = OWN_SCHEDULER,
    adapter: str = NO_ADAPTER,
    scale: float = 1.0,
    word_maps: bool = False,
    neighbours: bool = False,
) -> Drawing:
    """Draw a prompt; image k has the seed `seed` + k, and is the one that `visbio generate` draws.

    Raises:
        ValueError: for an empty prompt, and for numbers and names beyond the page's limits.
    """
    prompt = check_prompt(prompt)
    check_whole("number of images", num_images, 1, MAX_IMAGES)
    check_whole("seed", seed, 0, MAX_SEED)
    items = [generate.Item(prompt, int(seed) + k, "") for k in range(int(num_images))]
    with models.studio(adapter, scale, scheduler, steps, guidance_scale) as studio, heard_warnings() as warnings:
        records = [generate.png_record(studio, item) for item in items]
        sheet = None
        if word_maps:
            generators = [torch.Generator().manual_seed(item.seed) for item in items]
            heads = HEADS.get(studio.provenance["model"])
            found = attribute_words(studio.pipe, [prompt] * len(items), heads, generator=generators, **studio.call)
            images, sheet = [each.image for each in found], _stacked([word_sheet(each) for each in found])
        else:
            images = [image for _, image in generate.draw(studio, [items], len(items))]
    shown = nearest_sheet(images, models.reference) if neighbours and models.reference else None
    return Drawing(images, records, sheet, shown, warnings)


def nearest_sheet(images: list[Image.Image], reference: Reference) -> Image.Image:
    """Return a picture of images above the real ones that are nearest to them in pixels, with how far they are."""
    pixels = np.stack([np.asarray(image) for image in images])
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    distances, rows = nearest_distances(pixels, reference.images)
    levels = 255 * distances / np.sqrt(pixels[0].size)
    captions = [f"{reference.captions[row]}: {level:.0f} levels apart" for row, level in zip(rows, levels)]
    nearest = [Image.fromarray(reference.images[row].squeeze()) for row in rows]
    return contact_sheet([*images, *nearest], ["drawn"] * len(images) + captions, len(images), TILE, 3)


def _stacked(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of one size one below another."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width, height * len(pictures)), "white")
    for row, picture in enumerate(pictures):
        sheet.paste(picture, (0, row * height))
    return sheet
