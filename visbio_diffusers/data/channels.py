"""Channels of a microscope as RGB: which colour each has, and which of its values are black and white.

A single channel is grey. Of several, each has the colour that its name stands for (`COLOURS`); the others take those
left of red, green, blue, magenta and cyan in this order. So nucleus and cytoplasm are blue and green, as in Cellpose's
own data, and channels without names red, green and blue, as in `read_photograph`. Colours are added where channels
overlap. Each channel is stretched by itself from its 1st percentile in the whole image to its 99.8th. The colours of
stained tissue stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from visbio_diffusers.data.micrograph import Micrograph
from visbio_diffusers.data.photograph import PERCENTILES


FLUORESCENCE, TISSUE, BRIGHT_FIELD = STAINS = "fluorescence", "stained tissue", "bright field"
SAMPLE = 2**22  # pixels, evenly spaced, that speak for a larger image
LEFT_OUT = "none"  # name of a channel that is not shown
COLOURS = {
    "blue": r"nucle|dapi|hoechst|\bdna\b|h2b|histone|draq|sytox|\b405\b",
    "green": r"cyto|membrane|gfp|fitc|yfp|\b488\b",
    "red": r"rfp|cherry|tomato|tritc|cy3|texas|\b5[456]\d\b|\b594\b",
    "magenta": r"cy5|far.?red|\b6[34]\d\b",
    "grey": r"bright.?field|phase|transmi|\bdic\b|\bbf\b",
}
RGB = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "magenta": (1, 0, 1), "cyan": (0, 1, 1)}
WHITE = {"grey": (1, 1, 1)}


class Look(NamedTuple):
    """How an image becomes RGB.

    Args:
        stain (`str`): one of `STAINS`.
        names, colours (`tuple[str, ...]`): of the channels that are shown; a name is "" if unknown.
        shown (`tuple[int, ...]`): their places in the image; empty if all its channels are grey and one.
        low, high (`np.ndarray` of shape `(channels,)`): the values that are black and full colour.
    """

    stain: str
    names: tuple[str, ...]
    colours: tuple[str, ...]
    shown: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray

    def to_rgb(self, values: np.ndarray) -> np.ndarray:
        """Return a part of the image `(height, width, channels)` as uint8 `(height, width, 3)`.

        Raises:
            ValueError: if a value is not finite.
        """
        if self.stain == TISSUE and values.dtype == np.uint8:
            return np.ascontiguousarray(values)
        scaled = np.clip((_shown(values, self.shown) - self.low) / np.maximum(self.high - self.low, 1e-6), 0, 1)
        if self.colours == ("grey",):
            return np.repeat((scaled * 255).round().astype(np.uint8), 3, axis=2)
        mixed = scaled @ np.array([(RGB | WHITE)[colour] for colour in self.colours], np.float32)
        return (np.minimum(mixed, 1) * 255).round().astype(np.uint8)


def choose_look(image: Micrograph, channel_names: Sequence[str] = ()) -> Look:
    """Return how an image becomes RGB, from its values and the names of its channels.

    Three channels without names are a photograph in colour: grey, and one channel, if they differ by no more than 8 of
    255 grey levels on average and a quarter of the brightest; stained tissue if the median of the brightest is above
    half; else fluorescence. A single channel is fluorescence if its name is that of a dye or, without, if its median
    is below half once stretched.

    Args:
        image (`Micrograph`): an image.
        channel_names (`Sequence[str]`): in place of those in the file; "none" leaves a channel out.

    Raises:
        ValueError: if there are not as many names as channels, no channel is shown, or a value is not finite.
    """
    step = int(np.ceil(np.sqrt(max(image.values[:, :, 0].size / SAMPLE, 1))))
    sample = image.values[::step, ::step]
    count, names = image.values.shape[2], tuple(channel_names) or image.channel_names
    shown = tuple(place for place, name in enumerate(names) if name != LEFT_OUT)
    if count == 3 and not any(image.channel_names) and len(channel_names) != 3:
        full = 255.0 if sample.dtype == np.uint8 else float(np.percentile(sample, PERCENTILES[1]))
        stain = _stain_of_colours(sample, full)
        if stain == TISSUE and not channel_names:
            return Look(TISSUE, names, tuple(RGB)[:3], shown, np.zeros(3, np.float32), np.full(3, full, np.float32))
        if stain is None:
            count, names, shown = 1, tuple(channel_names) or ("",), ()
    if len(names) != count:
        raise ValueError(f"has not {len(names)} channels ({', '.join(names)}) but {count}: name each of them, or none")
    if set(names) == {LEFT_OUT}:
        raise ValueError(f"has no channel that is not left out as {LEFT_OUT!r}: name one")
    names = tuple(name for name in names if name != LEFT_OUT)
    sample = _shown(sample, shown)
    low, high = np.percentile(sample, PERCENTILES, axis=(0, 1))
    dark = len(names) > 1 or np.median((sample - low) / np.maximum(high - low, 1e-6)) < 0.5
    return Look(_stain_of_names(names, dark), names, choose_colours(names), shown, low, high)


def choose_colours(names: Sequence[str]) -> tuple[str, ...]:
    """Return the colours of channels by their names; a single one is grey.

    >>> choose_colours(["DAPI", "actin", "GFP"])
    ('blue', 'red', 'green')
    """
    if len(names) == 1:
        return ("grey",)
    chosen = [_meaning(name) for name in names]
    chosen = [None if colour != "grey" and colour in chosen[:place] else colour for place, colour in enumerate(chosen)]
    left = iter([colour for colour in RGB if colour not in chosen])
    return tuple(colour or next(left) for colour in chosen)


def _meaning(name: str) -> str | None:
    """Return the colour that a channel's name stands for."""
    return next((colour for colour, words in COLOURS.items() if re.search(words, name, re.IGNORECASE)), None)


def _stain_of_colours(sample: np.ndarray, full: float) -> str | None:
    """Return what three channels without names show, where `full` is white; None if they are grey."""
    planes = np.ascontiguousarray(np.moveaxis(sample, 2, 0))
    brightest, darkest = np.maximum.reduce(planes), np.minimum.reduce(planes)
    brightness, darkness = (255 * side.mean(dtype=float) / (full or 1) for side in (brightest, darkest))
    if brightness - darkness <= min(8, brightness / 4):
        return None
    return TISSUE if np.median(brightest) > full / 2 else FLUORESCENCE


def _stain_of_names(names: tuple[str, ...], dark: bool) -> str:
    meanings = {_meaning(name) for name in names}
    if meanings == {"grey"}:
        return BRIGHT_FIELD
    return FLUORESCENCE if dark or meanings != {None} else BRIGHT_FIELD


def _shown(values: np.ndarray, shown: tuple[int, ...]) -> np.ndarray:
    """Return the channels that are shown as float32; their mean if all are grey.

    Raises:
        ValueError: if a value is not finite.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("has values that are not finite (NaN or infinite): replace them")
    if shown:
        return values[:, :, shown].astype(np.float32)
    return sum(values[:, :, place, None].astype(np.float32) for place in range(3)) / 3
