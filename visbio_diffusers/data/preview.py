"""A look at an image set before training on it: a contact sheet with captions, and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.duplicates import Fingerprints
from visbio_diffusers.data.pools import caption_pools, label_key
from visbio_diffusers.grid import contact_sheet, save_png


CAPTIONS_PER_CLASS = 64
BLOCK_BYTES = 2**23  # images that are measured together
FREQUENT_SIZES = 5
NAMED = 5  # groups, and images of each
COLOURS = ("red", "green", "blue")


@dataclass
class CaptionLengths:
    """Counts the tokens of captions.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`).
        limit (`int`): tokens that the text encoder takes, special ones included.
    """

    tokenizer: Any
    limit: int
    captions: int = 0
    too_long: int = 0
    longest: int = 0
    example: str = ""

    def add(self, captions: list[str]) -> None:
        """Take in the next captions."""
        for caption, tokens in zip(captions, self.tokenizer(captions, verbose=False)["input_ids"], strict=True):
            self.captions += 1
            self.too_long += len(tokens) > self.limit
            if len(tokens) > self.longest:
                self.longest, self.example = len(tokens), caption

    def figures(self) -> dict[str, Any]:
        """Return `captions`, `limit`, `too_long` (numbers), `longest` (in tokens) and `example`, the longest one."""
        return {name: getattr(self, name) for name in ("captions", "limit", "too_long", "longest", "example")}


@dataclass
class _Figures:
    """What is counted while the images of a split pass by."""

    sizes: Counter = field(default_factory=Counter)
    classes: Counter = field(default_factory=Counter)
    subtypes: Counter = field(default_factory=Counter)
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    grey: bool = True

    def add(self, items: list[dict[str, Any]], images: np.ndarray) -> None:
        self.sizes[images.shape[1:3]] += len(images)
        self.subtypes.update(item["subtype"] for item in items if item["subtype"] is not None)
        for item in items:
            if np.ndim(item["label"]) == 1:
                self.classes.update(np.flatnonzero(item["label"]).tolist())
            elif item["label"] is not None:
                self.classes[item["label"]] += 1
        self.grey = self.grey and bool((images == images[..., :1]).all())
        for channel in range(images.shape[3]):
            self.levels[channel] += np.bincount(images[..., channel].ravel(), minlength=256)


def preview(
    dataset: ImageDataset,
    output_path: str | Path,
    num_images: int = 32,
    seed: int = 0,
    others: Sequence[ImageDataset] = (),
    lengths: CaptionLengths | None = None,
) -> dict[str, Any]:
    """Write a contact sheet of random images with their training captions, and return the figures of the set.

    All images are looked at, one after the other; where there are no captions, the sheet shows files or rows.

    Args:
        dataset (`ImageDataset`): as `load_image_dataset` returns it.
        output_path (`str` or `Path`): the PNG to write.
        num_images (`int`): images on the sheet, at most as many as there are.
        seed (`int`): of the choice and the captions.
        others (`Sequence[ImageDataset]`): other splits of the set, in which duplicates are looked for too.
        lengths (`CaptionLengths`, *optional*): counts the tokens of the set's own captions, or of 64 of each class.

    Returns:
        `name`, `split`, `licence`, `num_images`, `channels` (1 also for RGB files that are all grey), `class_counts`
        and `subtype_counts` (name to number, `None` where unknown), `smallest` and `largest` as (height, width),
        `sizes` (the most frequent ones, each with its number), `intensity` (minimum, maximum, mean and std of each
        channel, in [0, 255]), `captioned` (whether there is anything to make captions of), `tokens` (see
        `CaptionLengths`, or `None`) and `duplicates`: the images in each of `splits`, and of `exact` and `near` ones
        the number of `groups`, of `images` in them, of groups `across_splits` and of those `in_conflict`, which have
        different classes, and the `first` groups by the files or rows of their first images.

    Raises:
        ValueError: if `num_images` is below 1, or an image cannot be read.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: show at least 1")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(dataset))[:num_images].tolist()
    captioned = any(known is not None for known in (dataset.bank, dataset.captions, dataset.class_names))
    captions = [where(dataset, index) for index in chosen]
    if captioned:
        caption_fn, wordings = caption_pools([dataset], CAPTIONS_PER_CLASS, seed)
        captions = [caption_fn(0, dataset[index], rng) for index in chosen]
        if lengths is not None:
            for start in range(0, len(wordings), 1000):
                lengths.add(wordings[start : start + 1000])
    save_png(contact_sheet([_to_pil(dataset[index]["image"]) for index in chosen], captions), output_path)

    found, prints, labels = _Figures(), Fingerprints(), []
    with tqdm(desc="looking", total=sum(map(len, (dataset, *others))), unit="image", disable=None) as progress:
        for split in (dataset, *others):
            for items in _blocks(split):
                images = np.stack([item["image"] for item in items])
                prints.add(images)
                labels += [None if item["label"] is None else label_key(item["label"]) for item in items]
                if split is dataset:
                    found.add(items, images)
                progress.update(len(items))
    sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
    return {
        "name": dataset.name,
        "split": dataset.split,
        "licence": dataset.licence,
        "num_images": len(dataset),
        "class_counts": _class_counts(found.classes, dataset.class_names),
        "subtype_counts": dict(sorted(found.subtypes.items())) or None,
        "channels": 1 if found.grey else 3,
        "smallest": sizes[0],
        "largest": sizes[-1],
        "sizes": found.sizes.most_common(FREQUENT_SIZES),
        "intensity": _intensity(found.levels, found.grey),
        "captioned": captioned,
        "tokens": lengths.figures() if lengths is not None and captioned else None,
        "duplicates": _duplicates((dataset, *others), prints, labels),
    }


def where(dataset: ImageDataset, index: int) -> str:
    """Return the file of an image, or its row where it comes from no file of its own."""
    name: Callable[[int], str] | None = getattr(dataset.images, "where", None)
    return f"row {index}" if name is None else name(index)


def _blocks(dataset: ImageDataset) -> Iterator[list[dict[str, Any]]]:
    """Yield all items, in blocks whose images have one size."""
    block: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        item = dataset[index]
        shape = item["image"].shape
        if block and (shape != block[0]["image"].shape or len(block) * item["image"].nbytes >= BLOCK_BYTES):
            yield block
            block = []
        block.append(item)
    yield block


def _class_counts(classes: Counter, names: tuple[str, ...] | None) -> dict[str, int] | None:
    if not classes:
        return None
    names = names or tuple(map(str, range(max(classes) + 1)))
    return {name: classes[index] for index, name in enumerate(names)}


def _intensity(levels: np.ndarray, grey: bool) -> dict[str, dict[str, float]]:
    """Return the figures of each channel from its histogram."""
    figures = {}
    for name, counts in zip(("grey",) if grey else COLOURS, levels, strict=False):
        present = np.flatnonzero(counts)
        mean = np.average(np.arange(256), weights=counts)
        std = np.sqrt(np.average((np.arange(256) - mean) ** 2, weights=counts))
        figures[name] = {
            "minimum": int(present[0]),
            "maximum": int(present[-1]),
            "mean": round(float(mean), 2),
            "std": round(float(std), 2),
        }
    return figures


def _duplicates(splits: Sequence[ImageDataset], prints: Fingerprints, labels: list[Any]) -> dict[str, Any]:
    starts = np.cumsum([0, *map(len, splits)])

    def read(index: int) -> np.ndarray:
        place = int(np.searchsorted(starts, index, side="right")) - 1
        return splits[place][index - int(starts[place])]["image"]

    def describe(groups: list[np.ndarray]) -> dict[str, Any]:
        of_split = [np.searchsorted(starts, group, side="right") - 1 for group in groups]
        return {
            "groups": len(groups),
            "images": sum(map(len, groups)),
            "across_splits": sum(len(set(places.tolist())) > 1 for places in of_split),
            "in_conflict": sum(len({labels[index] for index in group}) > 1 for group in groups),
            "first": [
                [f"{splits[p].split} {where(splits[p], int(i - starts[p]))}" for p, i in zip(places[:NAMED], group)]
                for places, group in zip(of_split[:NAMED], groups)
            ],
        }

    return {
        "splits": {split.split: len(split) for split in splits},
        "exact": describe(prints.exact_groups()),
        "near": describe(prints.near_groups(read)),
    }


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
