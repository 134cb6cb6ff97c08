"""Pairs of images of which one was preferred, as people or programs have judged them.

A file of pairs is JSON lines: {"prompt": ..., "image_w": FILE, "image_l": FILE, "who": ..., "when": ...}, image_w
being the better one; files are named from the folder of the JSON lines, and `who` and `when` may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from visbio_diffusers.data.dataset import fit_image


class Preferences(NamedTuple):
    """Prompts, and the better and the worse image of each, uint8 `(n, height, width, channels)`."""

    prompts: list[str]
    better: np.ndarray
    worse: np.ndarray


def load_preferences(file: str | Path, resolution: int, channels: int = 3) -> Preferences:
    """Read pairs, their images in one size.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no pair, or its images cannot be read; the message names the line.
    """
    file = Path(file)
    prompts, images = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            prompts.append(str(pair["prompt"]))
            images.append(
                [_read(file.parent, str(pair[name]), resolution, channels) for name in ("image_w", "image_l")]
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{file} line {number} is no pair of images: {reason}") from error
    if not prompts:
        raise ValueError(f"{file} holds no pairs of images")
    better, worse = (np.stack(each) for each in zip(*images))
    return Preferences(prompts, better, worse)


def _read(folder: Path, name: str, resolution: int, channels: int) -> np.ndarray:
    """Return an image of the folder; a name that leads out of it is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside of {folder}")
    try:
        with Image.open(path) as image:
            return fit_image(image.convert("RGB"), resolution, channels)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image") from error


def preference_batches(
    preferences: Preferences, size: int, seed: int, start: int, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield endless micro-batches from the one numbered `start` on; each pass has an order of its own.

    Each holds `better` and `worse`, float `(size, channels, height, width)` in [-1, 1], and `prompts`.
    """
    count = len(preferences.prompts)
    index = (start * world + rank) * size
    while True:
        places = np.arange(index, index + size)
        orders = {turn: np.random.default_rng([seed, int(turn)]).permutation(count) for turn in set(places // count)}
        rows = [int(orders[place // count][place % count]) for place in places]
        pixels = [
            torch.as_tensor(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
            for images in (preferences.better, preferences.worse)
        ]
        yield {"better": pixels[0], "worse": pixels[1], "prompts": [preferences.prompts[row] for row in rows]}
        index += size * world
