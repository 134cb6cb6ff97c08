"""Real images in which the place of what a word names is known, away from the middle, to test maps of words on.

A map that marks the middle of every image, where blood cells lie in their photographs, is of no worth here: over the
200 test images of each set a centred Gaussian ranks the pixels in question below the others (AUC 0.44 and 0.29).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import load_cellpose, load_image_dataset
from visbio_diffusers.evaluation.metrics import Z_95
from visbio_diffusers.wording import fit_articles


MARGIN = 2  # pixels around a stained part that still belong to its cell
SHIFTS = 7, 8, 9  # pixels, of 28
MAX_OBJECTS = 3


class Truth(NamedTuple):
    """Images with prompts, and the place of what one word of each names.

    Args:
        images (`np.ndarray` of shape `(n, height, width, 3)`, uint8): real, or put together from a real one.
        masks (`np.ndarray` of shape `(n, height, width)`, bool): the place.
        prompts (`list[str]`): of each image.
        words (`list[str]`): the word of each prompt, such as "monocyte".
        kinds (`list[str]`): class or stain of each image.
    """

    images: np.ndarray
    masks: np.ndarray
    prompts: list[str]
    words: list[str]
    kinds: list[str]


def stained_cell(image: np.ndarray) -> np.ndarray | None:
    """Return the stained part of the cell in the middle of a blood image, bool `(height, width)`, without gaps.

    It is the convex hull of the connected part above Otsu's threshold of saturation less brightness that lies nearest
    to the middle; None where that is small or off the middle, or something else in the image is stained as well.
    """
    from skimage.filters import threshold_otsu  # an extra
    from skimage.measure import label, regionprops
    from skimage.morphology import convex_hull_image

    levels = image.astype(np.float64) / 255
    brightest = levels.max(axis=2)
    staining = (brightest - levels.min(axis=2)) / np.maximum(brightest, 1e-6) - levels.mean(axis=2)
    stained = staining > threshold_otsu(staining)
    middle = (np.array(stained.shape) - 1) / 2
    parts = [part for part in regionprops(label(stained)) if part.area >= 20]
    if not parts:
        return None
    nearest = min(parts, key=lambda part: np.hypot(*(np.array(part.centroid) - middle)))
    mask = convex_hull_image(label(stained) == nearest.label)
    is_central = np.hypot(*(np.argwhere(mask).mean(axis=0) - middle)) <= 3
    return mask if is_central and (stained & ~mask).sum() <= MARGIN * mask.sum() / 20 else None


def move_off_centre(
    image: np.ndarray, mask: np.ndarray, shifts: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Shift an image and its mask down and right, or up and left where negative.

    What comes free is filled with the strip between that border and the cell, mirrored as often as needed, so that it
    shows background of the same photograph and no second cell. Returns None where that strip is under 4 pixels wide.
    """
    for axis, shift in enumerate(shifts):
        image, mask = (each.swapaxes(0, axis)[:: 1 if shift > 0 else -1] for each in (image, mask))
        start = int(np.flatnonzero(mask.any(axis=1))[0]) - MARGIN
        if start < 4:
            return None
        image, mask = (_fill(each, start, abs(shift)) for each in (image, mask))
        image, mask = (each[:: 1 if shift > 0 else -1].swapaxes(0, axis) for each in (image, mask))
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def _fill(pixels: np.ndarray, start: int, shift: int) -> np.ndarray:
    """Return `pixels` moved down; the new rows are those above `start`, mirrored upwards."""
    margins = [(shift, 0), *[(0, 0)] * (pixels.ndim - 1)]
    return np.concatenate([np.pad(pixels[:start], margins, mode="reflect")[:shift], pixels[:-shift]])


def off_centre_cells(dataset_name: str, split: str, count: int, seed: int = 0, side: int = 28) -> Truth:
    """Return blood cells out of real photographs, moved to a random corner of their own background.

    Prompts are of the form "a monocyte, Wright-Giemsa stain"; the word is the last of the cell's name.

    Args:
        dataset_name (`str`), split (`str`): rebuilt BloodMNIST, as a file or a folder.
        count (`int`): images wanted; fewer if the split has no more that can be moved.
        seed (`int`): of the choice of images and corners.
        side (`int`): of the images, in pixels.
    """
    dataset = load_image_dataset(dataset_name, split, resolution=side)
    bank, rng = load_bank("bloodmnist"), np.random.default_rng(seed)
    found = []
    for row in rng.permutation(len(dataset)):
        shifts = rng.choice(SHIFTS, 2) * side // 28 * rng.choice([-1, 1], 2)
        image = dataset[int(row)]["image"]
        mask = stained_cell(image)
        moved = None if mask is None else move_off_centre(image, mask, tuple(shifts.tolist()))
        if moved is not None:
            words = bank.classes[int(dataset.labels[row])]
            phrase = fit_articles(words.noun_phrase(words.prompt))
            found.append((*moved, f"{phrase}, Wright-Giemsa stain", phrase.split()[-1], words.name))
        if len(found) == count:
            break
    return _as_truth(found, f"{dataset_name} ({split}) has no cell that can be moved off the middle")


def off_centre_nuclei(dataset_name: str, split: str, count: int, seed: int = 0, side: int = 28) -> Truth:
    """Return tiles of photographs with masks that show up to three nuclei, farther from the middle than pixels are.

    That is by the mean of the squared distance. Prompts are the captions of the tiles; the word is "nucleus" or
    "nuclei".

    Args:
        dataset_name (`str`), split (`str`), side (`int`): as of `load_cellpose`, for tiles of 64 pixels.
        count (`int`), seed (`int`): tiles wanted, and the seed of their choice.
    """
    dataset = load_cellpose(dataset_name, split, 64, side)
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    distance = rows**2 + columns**2
    found = []
    for row in np.random.default_rng(seed).permutation(len(dataset)):
        mask = dataset.masks[row] > 0
        if mask.any() and dataset.masks[row].max() <= MAX_OBJECTS and distance[mask].mean() > distance.mean():
            caption = dataset.captions[row]
            word = next(word for word in ("nucleus", "nuclei") if word in caption)
            found.append((dataset.images[row], mask, caption, word, dataset.class_names[dataset.labels[row]]))
        if len(found) == count:
            break
    return _as_truth(found, f"{dataset_name} ({split}) has no tile whose nuclei lie off the middle")


def _as_truth(found: list[tuple], message: str) -> Truth:
    if not found:
        raise ValueError(f"{message}: give another set or split")
    images, masks, *texts = zip(*found)
    return Truth(np.stack(images), np.stack(masks), *map(list, texts))


def centred_gaussian(height: int, width: int) -> np.ndarray:
    """Return a bump in the middle, `(height, width)`, with a standard deviation of a fifth of each side."""
    rows, columns = ((np.arange(side) - (side - 1) / 2) / (side / 5) for side in (height, width))
    return np.exp(-(rows[:, None] ** 2 + columns**2) / 2)


def pixel_auc(values: np.ndarray, mask: np.ndarray) -> float:
    """Return how well a map ranks the pixels in a mask above those outside: area under the ROC curve, 0.5 is chance.

    Args:
        values (`np.ndarray` of shape `(height, width)`): the map; equal values count half.
        mask (`np.ndarray` of shape `(height, width)`, bool): with pixels inside and outside.
    """
    inside, outside = np.sort(values[mask]), values[~mask]
    below = len(inside) - np.searchsorted(inside, outside, side="right")
    equal = len(inside) - np.searchsorted(inside, outside, side="left") - below
    return float((below + equal / 2).sum() / (len(inside) * len(outside)))


def mean_interval(values: np.ndarray) -> dict:
    """Return the mean of `(n,)` values with its 95 % interval, as `dict(value, low, high, n)`, by normal theory."""
    half = Z_95 * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return {"value": mean, "low": mean - float(half), "high": mean + float(half), "n": len(values)}
