"""A look at an image set before training on it: a contact sheet with captions, and its figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.mixture import caption_function


COLUMNS = 8
TILE = 160  # pixels
CAPTION_LINES = 4
LINE = 13  # pixels
MEASURED = 1000  # images behind the figures


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
    caption_fn = caption_function([dataset])
    items = [dataset[index] for index in order[:num_images]]
    _save_png(_contact_sheet(items, [caption_fn(0, item, rng) for item in items]), Path(output_path))
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


def _contact_sheet(items: list[dict[str, Any]], captions: list[str]) -> Image.Image:
    columns = min(COLUMNS, len(items))
    rows = -(-len(items) // columns)
    height = TILE + CAPTION_LINES * LINE + 8
    sheet = Image.new("RGB", (columns * (TILE + 8), rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (item, caption) in enumerate(zip(items, captions, strict=True)):
        left, top = (place % columns) * (TILE + 8) + 4, (place // columns) * height + 4
        array = item["image"]
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")
        scale = TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(
            image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC), (left, top)
        )
        for number, line in enumerate(_wrap(caption, font)):
            draw.text((left, top + TILE + number * LINE), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a caption into lines of a tile's width; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} ..."]
    return lines


def _save_png(image: Image.Image, path: Path) -> None:
    """Write beside the target and rename, so that no half picture remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            image.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
