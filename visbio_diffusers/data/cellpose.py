"""Photographs with instance masks in Cellpose's layouts, cut into tiles that are captioned by what is measured.

Masks are 0 for background and 1 to N for the objects. They lie beside their photograph as `NAME_masks.*` or, as
Cellpose saves them, `NAME_cp_masks.*`, where the photograph is `NAME_img.*` or else `NAME.*`; or in a folder `masks/`
of their own, where the photograph is in `images/` beside it, or one level up. All this in one folder or in any folders
below. Where one of the first level is called train, val, validation or test, those of this level are the splits. Else
splits are by photograph: a tenth each for validation and test, chosen by a checksum of its folder and NAME.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from visbio_diffusers.data.channels import STAINS, choose_look
from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError, fit_image, fit_mask
from visbio_diffusers.data.micrograph import Micrograph, read_masks, read_micrograph
from visbio_diffusers.data.objects import Content, Scene, describe, measure, parse_noun
from visbio_diffusers.data.photograph import SUFFIXES


logger = logging.getLogger(__name__)

SPLITS = {"test": (0,), "val": (1,), "validation": (1,), "train": tuple(range(2, 10))}
ALIASES = {"val": "validation", "validation": "val"}
MASKS = re.compile(r"(.+?)(_img)?(_cp)?_masks")
BY_PRODUCTS = re.compile(r".+_(cp_output|outlines|flows(_\d)?|dP|cellprob)")  # of Cellpose
PICKLE = "_seg.npy"
WAY_OUT = "save masks in Cellpose by File > Save masks as PNG/tif, or run it with --save_png or --save_tif"


class Pair(NamedTuple):
    """A photograph and its masks, called by its folder below the data set's and NAME."""

    name: str
    image: Path
    masks: Path


class Tile(NamedTuple):
    """A tile of a photograph: uint8 `(resolution, resolution, 3)`, its masks in the same size, and what it shows."""

    image: np.ndarray
    masks: np.ndarray
    content: Content
    scene: Scene


@dataclass(frozen=True)
class Tiling:
    """How photographs are cut, see [`load_cellpose`]."""

    size: int
    overlap: float = 0.0
    min_object_area: float = 0.01

    def __post_init__(self) -> None:
        """Check the values."""
        if self.size < 1:
            raise ValueError(f"tile_size={self.size}: tiles have at least 1 pixel a side")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"tile_overlap={self.overlap}: it is a share of the tile, from 0 to 0.9")
        if not 0 <= self.min_object_area <= 1:
            raise ValueError(f"min_object_area={self.min_object_area}: it is a share of the tile, from 0 to 1")

    def starts(self, length: int) -> list[int]:
        """Return where tiles begin along a side; where they overlap, the last one ends with the side."""
        step = max(1, round(self.size * (1 - self.overlap)))
        starts = list(range(0, length - self.size + 1, step))
        if self.overlap and starts and starts[-1] + self.size < length:
            starts.append(length - self.size)
        return starts


def is_cellpose(folder: Path) -> bool:
    """Return whether a folder holds masks in one of Cellpose's layouts, or what Cellpose saves in place of them."""
    if not folder.is_dir():
        return False
    masks = next((path for path in folder.rglob("*_masks.*") if path.suffix.lower() in SUFFIXES), None)
    if masks or any(path.with_name("images").is_dir() for path in folder.rglob("masks") if path.is_dir()):
        return True
    return any(folder.rglob(f"*{PICKLE}")) and not any(folder.rglob("metadata.*"))


def load_cellpose(
    name: str,
    split: str,
    tile_size: int,
    resolution: int | None = None,
    *,
    tile_overlap: float = 0.0,
    min_object_area: float = 0.01,
    object_name: str = "nucleus",
    channel_names: Sequence[str] = (),
) -> ImageDataset:
    """Load one split of a folder in Cellpose's layout: the tiles that show an object, with captions and masks.

    The number in a caption is that of the instances in the tile's masks at the size of the tile. Masks are resized by
    the nearest pixel, which keeps every object that covers a square of `tile_size / resolution` pixels, rounded up;
    thinner ones may be lost (one of 37,147 in the nuclei of the Data Science Bowl 2018, from 64 to 28 pixels).

    Args:
        name (`str`): the folder.
        split (`str`): "train", "val" or "test", or a folder of the set's own, see above.
        tile_size (`int`): side of the tiles in pixels of the photographs, which are covered from their upper left.
        resolution (`int`, *optional*): side of the images, to which tiles are resized; default is `tile_size`.
        tile_overlap (`float`): share of a tile, 0 to 0.9, that it has in common with the next. Without overlap, what
            is left at the right and below is in no tile; with it, the last tile is moved inwards, and all is covered.
        min_object_area (`float`): share of a tile below which an object's part in it does not count and is erased.
        object_name (`str`): what an object is, for captions: "cell", or "ovum/ova" with its plural.
        channel_names (`Sequence[str]`): of every photograph, in place of those in its file; see `data/channels.py`.

    Raises:
        ValueError: for an unknown split, a photograph or masks without the other, of other size, or that cannot be
            read, and if no photograph is as large as a tile or no tile shows an object; smaller ones are left out.
    """
    tiling, noun = Tiling(tile_size, tile_overlap, min_object_area), parse_noun(object_name)
    pairs = choose_split(find_pairs(Path(name).expanduser()), split, name)
    pool = ThreadPoolExecutor()
    try:
        cut = pool.map(lambda pair: cut_tiles(pair, tiling, resolution or tile_size, channel_names), pairs)
        shapes, tiles = zip(*tqdm(cut, desc="cutting tiles", total=len(pairs), disable=None))
    finally:
        pool.shutdown(cancel_futures=True)
    _report_loss(pairs, shapes, tiling, name)
    tiles = [tile for each in tiles for tile in each]
    if not tiles:
        raise ValueError(
            f"no tile of {tile_size} pixels in {name} shows an object of {min_object_area:.2%} of it or more: look"
            " whether its masks are empty, or choose another tile_size or a smaller min_object_area"
        )
    return ImageDataset(
        name=Path(name).name,
        split=split,
        images=np.stack([tile.image for tile in tiles]),
        labels=np.array([STAINS.index(tile.scene.stain) for tile in tiles]),
        captions=[describe(tile.content, tile.scene, noun) for tile in tiles],
        class_names=STAINS,
        masks=np.stack([tile.masks for tile in tiles]),
    )


def _report_loss(pairs: list[Pair], shapes: Sequence[tuple[int, int]], tiling: Tiling, name: str) -> None:
    """Log which photographs are smaller than a tile, and how much of the others is in none; refuse if all are."""
    lost, total = 0, 0
    for pair, (height, width) in zip(pairs, shapes):
        if min(height, width) < tiling.size:
            logger.warning("%s is smaller than a tile of %d pixels and is left out", pair.image, tiling.size)
        else:
            total += height * width
            lost += height * width - height // tiling.size * (width // tiling.size) * tiling.size**2
    if not total:
        raise ValueError(f"all photographs of {name} are smaller than a tile of {tiling.size}: lower tile_size")
    if lost and not tiling.overlap:
        share = 100 * lost / total
        logger.info("%s: %.1f %% lie beyond the last whole tiles; tile_overlap above 0 covers all", name, share)


def choose_split(pairs: list[Pair], split: str, name: str) -> list[Pair]:
    """Return the photographs of a split.

    Raises:
        ValueError: if there is no such split, or none in it.
    """
    folders = sorted({pair.name.partition("/")[0] for pair in pairs if "/" in pair.name})
    if set(folders) & SPLITS.keys():
        outside = [pair for pair in pairs if "/" not in pair.name]
        if outside:
            where = outside[0].image
            logger.warning("%s: %d outside the folders of its splits are left out: %s ...", name, len(outside), where)
        found = split if split in folders else ALIASES.get(split)
        if found not in folders:
            raise MissingSplitError(f"{name} has no split {split!r}: it has {', '.join(folders)}")
        return [pair for pair in pairs if pair.name.startswith(f"{found}/")]
    if split not in SPLITS:
        raise MissingSplitError(f"{name} has no split {split!r}: it has train, val, test")
    chosen = [pair for pair in pairs if zlib.crc32(pair.name.encode()) % 10 in SPLITS[split]]
    if not chosen:
        raise MissingSplitError(
            f"{name} has too few photographs for a split {split!r}: put them in folders train, val and test"
        )
    return chosen


def find_pairs(folder: Path) -> list[Pair]:
    """Return the photographs of a folder with their masks, by name; those without masks are left out with a warning.

    Where some are called NAME_img, other images without masks are none of the photographs.

    Raises:
        ValueError: if masks have no photograph, photographs have no masks but those of `_seg.npy`, none has masks, or
            two files are the same photograph or masks.
    """
    photographs, masks = defaultdict(list), defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            is_masks, name = _place(path, folder)
            if not BY_PRODUCTS.fullmatch(name):
                (masks if is_masks else photographs)[name].append(path)
    for name, paths in photographs.items():
        photographs[name] = [path for path in paths if _is_marked(path)] or paths
    for paths in (*masks.values(), *(photographs[name] for name in masks)):
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1].name} are both for the same photograph: remove one")
    for name in masks:
        if not photographs[name]:
            raise ValueError(f"{masks[name][0]} has no photograph {Path(name).name}.* or {Path(name).name}_img.*")
    marked = any(_is_marked(paths[0]) for paths in photographs.values())
    unmasked = [paths[0] for name, paths in photographs.items() if name not in masks]
    _check_unmasked([path for path in unmasked if _is_marked(path) or not marked], len(masks), folder)
    return [Pair(name, photographs[name][0], masks[name][0]) for name in sorted(masks)]


def _place(path: Path, folder: Path) -> tuple[bool, str]:
    """Return whether a file holds masks, and the folder and NAME of its photograph."""
    stem = path.name[: -len(path.suffix)].removesuffix(".ome")
    home = path.parent.relative_to(folder)
    apart = home.name == "masks" or (home.name == "images" and path.parent.with_name("masks").is_dir())
    named = MASKS.fullmatch(stem)
    stem = named[1] if named else stem.removesuffix("_img")
    return bool(named) or home.name == "masks", ((home.parent if apart else home) / stem).as_posix()


def _is_marked(path: Path) -> bool:
    """Return whether a photograph is called NAME_img."""
    return path.name[: -len(path.suffix)].removesuffix(".ome").endswith("_img")


def _check_unmasked(photographs: list[Path], masked: int, folder: Path) -> None:
    """Refuse photographs whose masks are in a pickle, or all of them, and warn of a few."""
    for path in photographs:
        stem = path.name[: -len(path.suffix)]
        for pickle in (path.with_name(stem + PICKLE), path.with_name(stem.removesuffix("_img") + PICKLE)):
            if pickle.is_file():
                raise ValueError(
                    f"the masks of {path} are in {pickle.name} alone, which is code to run and not read: {WAY_OUT}"
                )
    if not masked:
        raise ValueError(f"no photograph in {folder} has masks NAME_masks.png or .tif beside it: {WAY_OUT}")
    if photographs:
        count, example = len(photographs), photographs[0]
        logger.warning("%s: %d without masks are left out, such as %s", folder, count, example)


def cut_tiles(
    pair: Pair, tiling: Tiling, resolution: int, channel_names: Sequence[str] = ()
) -> tuple[tuple[int, int], list[Tile]]:
    """Return height and width of a photograph, and those of its tiles that show an object.

    Raises:
        ValueError: naming the file, if it cannot be read, or photograph and masks differ in size.
    """
    photograph, masks = read_micrograph(pair.image), read_masks(pair.masks)
    if photograph.values.shape[:2] != masks.shape:
        raise ValueError(f"{pair.masks} has {masks.shape} pixels, its photograph {photograph.values.shape[:2]}")
    try:
        return masks.shape, list(_cut(photograph, masks, tiling, resolution, channel_names))
    except ValueError as error:
        raise ValueError(f"{pair.image} {error}") from error


def _cut(
    photograph: Micrograph, masks: np.ndarray, tiling: Tiling, resolution: int, channel_names: Sequence[str]
) -> Iterator[Tile]:
    look = choose_look(photograph, channel_names)
    size = photograph.pixel_size
    scene = Scene(
        stain=look.stain,
        channels=tuple((name, colour) for name, colour in zip(look.names, look.colours) if name),
        pixel_size=size and size * tiling.size / resolution,
        width=size and size * tiling.size,
        magnification=photograph.magnification,
    )
    for top in tiling.starts(masks.shape[0]):
        for left in tiling.starts(masks.shape[1]):
            window = slice(top, top + tiling.size), slice(left, left + tiling.size)
            found, content = measure(masks[window], tiling.min_object_area)
            if content.count:
                image = fit_image(look.to_rgb(photograph.values[window]), resolution)
                yield Tile(image, fit_mask(found, resolution), content, scene)
