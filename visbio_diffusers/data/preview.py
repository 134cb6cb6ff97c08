"""A look at an image set before training on it: a contact sheet with captions, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.pools import caption_pools
from visbio_diffusers.grid import contact_sheet, save_png


MEASURED = 1000  # images behind the figures
CAPTIONS_PER_CLASS = 64


def preview(dataset: ImageDataset, output_path: str | Path, num_images: int = 32, seed: int = 0) -> dict[str, Any]:
    """Write a contact sheet of random images with their training captions, and return the figures of the set.

    Args:
        dataset (`ImageDataset`): as `load_image_dataset` returns it.
        output_path (`str` or `Path`): the PNG to write.
        num_images (`int`): images on the sheet, at most as many as there are.
        seed (`int`): of the choice and the captions.

    Returns:
        `name`, `split`, `licence`, `num_images`, `channels` (1 also for RGB files that are all grey), `class_counts`
        and `subtype_counts` (name to number, `None` where unknown), and over at most 1,000 images: `smallest` and
        `largest` as (height, width), and `intensity` with minimum, maximum, mean and std in [0, 255].

    Raises:
        ValueError: if `num_images` is below 1, or the set has nothing to make captions of.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: show at least 1")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(dataset))
    caption_fn, _ = caption_pools([dataset], CAPTIONS_PER_CLASS, seed)
    items = [dataset[index] for index in order[:num_images]]
    images = [_to_pil(item["image"]) for item in items]
    save_png(contact_sheet(images, [caption_fn(0, item, rng) for item in items]), output_path)
    return {
        "name": dataset.name,
        "split": dataset.split,
        "licence": dataset.licence,
        "num_images": len(dataset),
        "class_counts": _class_counts(dataset),
        "subtype_counts": None if dataset.subtypes is None else _counts(dataset.subtypes),
        **_measure([dataset[index]["image"] for index in order[:MEASURED]]),
    }


def _measure(images: list[np.ndarray]) -> dict[str, Any]:
    sizes = sorted((image.shape[:2] for image in images), key=lambda size: size[0] * size[1])
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in images])
    grey = bool((pixels == pixels[:, :1]).all())
    return {
        "channels": 1 if grey else 3,
        "smallest": sizes[0],
        "largest": sizes[-1],
        "intensity": {
            "minimum": int(pixels.min()),
            "maximum": int(pixels.max()),
            "mean": round(float(pixels.mean()), 2),
            "std": round(float(pixels.std()), 2),
        },
    }


def _class_counts(dataset: ImageDataset) -> dict[str, int] | None:
    if dataset.labels is None:
        return None
    if dataset.labels.ndim == 2:
        counts = dataset.labels.sum(axis=0)
    else:
        counts = np.bincount(dataset.labels, minlength=len(dataset.class_names or ()))
    names = dataset.class_names or [str(index) for index in range(len(counts))]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _counts(values: list[str | None]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted({v for v in values if v is not None})}


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
