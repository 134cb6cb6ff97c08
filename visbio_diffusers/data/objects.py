"""Objects in a tile of masks: which of them count, what is measured, and the caption that says so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from visbio_diffusers.data.channels import BRIGHT_FIELD, FLUORESCENCE, TISSUE


NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
KINDS = {FLUORESCENCE: "fluorescence image", TISSUE: "image of stained tissue", BRIGHT_FIELD: "bright-field image"}
PLURALS = {"nucleus": "nuclei", "nucleolus": "nucleoli", "bacterium": "bacteria", "mitochondrion": "mitochondria"}


class Content(NamedTuple):
    """What is measured in a tile: objects, their median diameter and their area as shares of the tile.

    The diameter is that of a circle of the object's area within the tile, over the tile's side.
    """

    count: int
    diameter: float
    covered: float


class Scene(NamedTuple):
    """What is known of a tile beside its objects.

    Args:
        stain (`str`): one of `STAINS`.
        channels (`tuple[tuple[str, str], ...]`): name and colour of each channel that has a name.
        pixel_size (`float`, *optional*): micrometres a pixel of the image made of the tile.
        width (`float`, *optional*): micrometres that the tile is wide.
        magnification (`float`, *optional*): of the objective.
    """

    stain: str
    channels: tuple[tuple[str, str], ...] = ()
    pixel_size: float | None = None
    width: float | None = None
    magnification: float | None = None


class Noun(NamedTuple):
    """What an object is called."""

    singular: str
    plural: str


def parse_noun(object_name: str) -> Noun:
    """Return singular and plural of "cell" by English rule, or of "embryo/embryos" as given.

    Raises:
        ValueError: if either is empty.
    """
    singular, slash, plural = (part.strip() for part in object_name.partition("/"))
    if not singular or (slash and not plural):
        raise ValueError(f"object_name={object_name!r} is no name: give one such as cell, or both as in ovum/ova")
    if not plural:
        head, space, last = singular.rpartition(" ")
        plural = head + space + (PLURALS.get(last) or _plural(last))
    return Noun(singular, plural)


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return f"{word[:-1]}ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def measure(masks: np.ndarray, min_object_area: float) -> tuple[np.ndarray, Content]:
    """Return what counts in a tile of masks, and its content.

    Args:
        masks (`np.ndarray` of shape `(side, side)`, integers from 0): 0 is background; equal numbers are one object,
            in however many pieces it lies within the tile.
        min_object_area (`float`): share of the tile below which the part of an object in it does not count.

    Returns:
        uint16 `(side, side)`, in which the objects that count are 1 to k in the order of their numbers and all else
        is 0, and the content.
    """
    masks = masks.astype(np.intp)
    areas = np.bincount(masks.ravel())
    areas[0] = 0
    kept = np.flatnonzero(areas >= max(min_object_area * masks.size, 1))
    numbers = np.zeros(len(areas), np.uint16)
    numbers[kept] = np.arange(1, len(kept) + 1)
    if not len(kept):
        return numbers[masks], Content(0, 0.0, 0.0)
    diameter = 2 * np.sqrt(np.median(areas[kept]) / np.pi) / masks.shape[0]
    return numbers[masks], Content(len(kept), float(diameter), float(areas[kept].sum() / masks.size))


def describe(content: Content, scene: Scene, noun: Noun) -> str:
    """Return a caption: kind of image and channels, number, size, crowding, magnification and size of a pixel.

    An object is small below a quarter of the tile and large above 0.4; more than 0.4 of the tile covered is crowded,
    less than 0.15 sparse. What is not known is not said.
    """
    size = "small" if content.diameter < 0.25 else "large" if content.diameter > 0.4 else "medium-sized"
    count = NUMBERS[content.count] if content.count < len(NUMBERS) else str(content.count)
    objects = f"{count} {size} {noun.singular if content.count == 1 else noun.plural}"
    if scene.width is not None:
        objects += f" of {_round(content.diameter * scene.width)} um"
    crowding = "crowded" if content.covered > 0.4 else "sparse" if content.covered < 0.15 else "spaced"
    parts = [_kind(scene), objects, crowding]
    if scene.magnification is not None:
        parts.append(f"{scene.magnification:g}x")
    if scene.pixel_size is not None:
        parts.append(f"{_round(scene.pixel_size)} um per pixel")
    return ", ".join(parts)


def _kind(scene: Scene) -> str:
    """Return the kind of image with the names of its channels, and their colours if they have one."""
    names = [name if colour == "grey" else f"{name} in {colour}" for name, colour in scene.channels]
    if not names or names[0].lower().replace("-", " ") in ("brightfield", "bright field"):
        return KINDS[scene.stain]
    if scene.stain == BRIGHT_FIELD:
        return f"{' and '.join(names)} image"
    *first, last = names
    return f"{KINDS[scene.stain]} of {', '.join(first)} and {last}" if first else f"{KINDS[scene.stain]} of {last}"


def _round(micrometres: float) -> str:
    """Return a length with two significant digits, or as a whole number above 99."""
    return f"{micrometres:.0f}" if micrometres >= 99.5 else f"{micrometres:.2g}"
