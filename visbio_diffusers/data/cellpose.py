"""Photographs with instance masks in Cellpose's layout, cut into tiles that are captioned by what is measured.

`NAME_img.*` is a photograph (8 or 16 bits, grey or colour), `NAME_masks.*` its masks: 0 is background, 1 to N are the
objects. Splits are by photograph: a tenth each for validation and test, chosen by a checksum of NAME.
"""

from __future__ import annotations

import logging
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError, fit_image


logger = logging.getLogger(__name__)

MASKS, PHOTOGRAPH = "_masks.", "_img."
STAINS = ("fluorescence", "stained tissue", "bright field")
SPLITS = {"test": (0,), "val": (1,), "validation": (1,), "train": tuple(range(2, 10))}
PERCENTILES = 1.0, 99.8  # of a grey photograph: black and white of its tiles
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


class Content(NamedTuple):
    """What is measured in a tile: kind of photograph, objects, their median diameter and area as shares of the tile.

    The diameter is that of a circle of the object's area within the tile, over the tile's side.
    """

    stain: str
    count: int
    diameter: float
    covered: float


@dataclass(frozen=True)
class Pair:
    """A photograph and its masks."""

    image: Path
    masks: Path

    @property
    def place(self) -> int:
        """Return 0 to 9 by the name, whatever other files there are."""
        return zlib.crc32(self.image.name.partition(PHOTOGRAPH)[0].encode()) % 10


def is_cellpose(folder: Path) -> bool:
    """Return whether a folder holds masks in Cellpose's naming."""
    return folder.is_dir() and any(folder.glob(f"*{MASKS}*"))


def load_cellpose(name: str, split: str, tile_size: int, resolution: int | None = None) -> ImageDataset:
    """Load one split of a folder in Cellpose's layout as captioned tiles; those without an object are left out.

    Grey photographs are stretched so that their 1st percentile is black and their 99.8th white; colours stay.

    Args:
        name (`str`): the folder.
        split (`str`): "train", "val" or "test".
        tile_size (`int`): side of the tiles in pixels of the photographs, which are covered from their upper left.
        resolution (`int`, *optional*): side of the images, to which tiles are resized; default is `tile_size`.

    Raises:
        ValueError: for an unknown split, a photograph without masks, of other size than they, or smaller than a tile.
        OSError: if a file cannot be read.
    """
    if split not in SPLITS:
        raise MissingSplitError(f"{name} has no split {split!r}: it has train, val, test")
    pairs = [pair for pair in find_pairs(Path(name)) if pair.place in SPLITS[split]]
    if not pairs:
        raise MissingSplitError(f"{name} has too few photographs for a split {split!r}")
    with ThreadPoolExecutor() as pool:
        cut = pool.map(lambda pair: cut_tiles(pair, tile_size, resolution or tile_size), pairs)
        found = [tile for tiles in tqdm(cut, desc="cutting tiles", total=len(pairs), disable=None) for tile in tiles]
    if not found:
        raise MissingSplitError(f"no tile of {tile_size} pixels in {name} shows an object: choose another tile_size")
    contents = [content for _, content in found]
    return ImageDataset(
        name=Path(name).name,
        split=split,
        images=np.stack([image for image, _ in found]),
        labels=np.array([STAINS.index(content.stain) for content in contents]),
        captions=[describe(content) for content in contents],
        class_names=STAINS,
    )


def find_pairs(folder: Path) -> list[Pair]:
    """Return the photographs of a folder with their masks, by name.

    Raises:
        ValueError: if masks have no photograph.
    """
    photographs = {path.name.partition(PHOTOGRAPH)[0]: path for path in folder.glob(f"*{PHOTOGRAPH}*")}
    pairs = []
    for masks in sorted(folder.glob(f"*{MASKS}*")):
        stem = masks.name.partition(MASKS)[0]
        if stem not in photographs:
            raise ValueError(f"{masks} has no photograph {stem}{PHOTOGRAPH}* beside it")
        pairs.append(Pair(photographs[stem], masks))
    return pairs


def cut_tiles(pair: Pair, tile_size: int, resolution: int) -> list[tuple[np.ndarray, Content]]:
    """Return the tiles of a photograph that show an object: uint8 `(resolution, resolution, 3)`, and its content."""
    with Image.open(pair.image) as image, Image.open(pair.masks) as opened:
        mode = image.mode if image.mode.startswith("I") else "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        pixels, masks = np.asarray(image.convert(mode)), np.asarray(opened)  # I is of 16 bits
    if masks.ndim != 2:
        raise ValueError(f"{pair.masks} is a colour image (mode {opened.mode}): masks are grey, 0 and 1 to N")
    if pixels.shape[:2] != masks.shape[:2]:
        raise ValueError(f"{pair.masks} has {masks.shape[:2]} pixels, its photograph {pixels.shape[:2]}")
    if min(masks.shape) < tile_size:
        raise ValueError(f"{pair.image} has {pixels.shape[:2]} pixels, less than a tile of {tile_size}")
    pixels, stain = normalise(pixels)
    tiles = []
    for top in range(0, masks.shape[0] - tile_size + 1, tile_size):
        for left in range(0, masks.shape[1] - tile_size + 1, tile_size):
            window = slice(top, top + tile_size), slice(left, left + tile_size)
            content = measure(masks[window], stain)
            if content.count:
                tiles.append((fit_image(np.ascontiguousarray(pixels[window]), resolution), content))
    return tiles


def normalise(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """Return a photograph as uint8 `(height, width, 3)`, and its kind.

    Coloured ones (a mean difference of 8 grey levels or more between the channels) are stained tissue. Grey ones are
    stretched from their 1st to their 99.8th percentile, and are fluorescence where the median is then below half.
    """
    if pixels.ndim == 3 and np.ptp(pixels.astype(np.int16), axis=2).mean() >= 8:
        return pixels, STAINS[1]
    grey = pixels.astype(np.float32) if pixels.ndim == 2 else pixels.mean(axis=2, dtype=np.float32)
    low, high = np.percentile(grey, PERCENTILES)
    grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)
    stain = STAINS[0] if np.median(grey) < 0.5 else STAINS[2]
    return np.repeat((grey * 255).round().astype(np.uint8)[:, :, None], 3, axis=2), stain


def measure(masks: np.ndarray, stain: str) -> Content:
    """Return the content of a tile from its masks `(side, side)`; parts of less than 1 % of it are no objects."""
    areas = np.unique(masks[masks > 0], return_counts=True)[1]
    areas = areas[areas >= 0.01 * masks.size]
    if not len(areas):
        return Content(stain, 0, 0.0, 0.0)
    diameter = 2 * np.sqrt(np.median(areas) / np.pi) / masks.shape[0]
    return Content(stain, len(areas), float(diameter), float(areas.sum() / masks.size))


def describe(content: Content) -> str:
    """Return a caption: number, size (small below a quarter of the tile, large above 0.4), stain and crowding."""
    size = "small" if content.diameter < 0.25 else "large" if content.diameter > 0.4 else "medium-sized"
    count = NUMBERS[content.count] if content.count < len(NUMBERS) else "many"
    noun = "nucleus" if content.count == 1 else "nuclei"
    crowding = "crowded" if content.covered > 0.4 else "sparse" if content.covered < 0.15 else "spaced"
    kind = {"fluorescence": "fluorescence image", "stained tissue": "image of stained tissue"}
    return f"{kind.get(content.stain, 'bright-field image')}, {count} {size} {noun}, {crowding}"
