"""Images of any origin as 8-bit RGB, by one rule for each kind: what a look at a single image starts from."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visbio_diffusers.files import one_line


SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"))
PERCENTILES = 1.0, 99.8  # black and white of values of more than 8 bits
MAX_CHANNELS = 8  # so many pages without a name are channels of one image, more are a series
UNREADABLE = OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, NotImplementedError, EOFError
UNREADABLE += struct.error, zlib.error, Image.DecompressionBombError
MAX_VALUES = 2**29  # of a file, 0.5 to 2 GB


def find_images(places: list[Path]) -> list[Path]:
    """Return the image files among paths, and those below folders, in the order given and by name.

    Raises:
        FileNotFoundError: if there is no such path, or a folder holds none.
    """
    found = []
    for place in places:
        if place.is_dir():
            inside = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise FileNotFoundError(f"no images in {place}: put them there or give another folder")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise FileNotFoundError(f"no file or folder {place}: check the path")
    return found


def read_photograph(path: str | Path, max_pixels: int = 0) -> Image.Image:
    """Read one image file as 8-bit RGB.

    Grey is spread to the three colours; transparent parts lie on white. Values of more than 8 bits, as in many
    micrographs, are stretched from their 1st to their 99.8th percentile, each channel by itself. Of several channels
    the first three are red, green and blue, and the others left out; of a stack (axis Z) the brightest value at each
    place counts, of a series the first image.

    Args:
        path (`str` or `Path`): of the file.
        max_pixels (`int`): an image of more is refused before it is decoded; 0 leaves it to the libraries' own limits.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, is empty or too large; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: check the path")
    try:
        if path.suffix.lower() in (".tif", ".tiff") and not is_plain(path):
            return Image.fromarray(_to_rgb(_read_tiff(path, max_pixels or MAX_VALUES)))
        with Image.open(path) as image:
            if max_pixels and image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels:,}")
            if is_cut(image):
                raise ValueError("a PNG of 16 bits in colour, of which Pillow reads 8: save it as TIFF")
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                return Image.fromarray(_to_rgb(np.asarray(image)))
            return _on_white(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ValueError(f"cannot read image {path} ({reason}): replace or remove it") from error


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (microscopy TIFF and PNG) to 8 bits; PIL's own conversion saturates everything above 255."""
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers of unknown range")
        return Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit floats of unknown range")
    return image


def is_plain(path: Path) -> bool:
    """Return whether a TIFF is a single picture of a kind that Pillow knows, compressed or not."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1 and not is_cut(image)
    except (UnidentifiedImageError, SyntaxError, ValueError, KeyError):
        return False


def is_cut(image: Image.Image) -> bool:
    """Return whether an image has 16 bits a colour, of which Pillow reads the upper eight."""
    return not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in image.tile)


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _read_tiff(path: Path, max_values: int) -> np.ndarray:
    """Return the first image of a TIFF, height x width or height x width x channels."""
    import tifffile  # for those who use it

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if np.prod(series.shape) > max_values:
            raise ValueError(f"{series.shape} are more than {max_values:,} values")
        values, axes, shape = series.asarray(), series.axes, series.shape
    named = [place for place, axis in enumerate(axes) if axis in "CS"]
    unnamed = [place for place, axis in enumerate(axes) if axis in "QI" and shape[place] <= MAX_CHANNELS]
    channel = next(iter(named + unnamed), None)
    for place in reversed(range(len(axes))):
        if axes[place] not in "YX" and place != channel:
            values = values.max(axis=place) if axes[place] == "Z" else values.take(0, axis=place)
    if channel is None:
        return values
    kept = [place for place, axis in enumerate(axes) if axis in "YX" or place == channel]
    return np.moveaxis(values, kept.index(channel), -1)


def _to_rgb(values: np.ndarray) -> np.ndarray:
    """Return an array height x width, or height x width x channels, as uint8 RGB."""
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"its shape {values.shape} is no image")
    values = values[:, :, :3]
    if values.dtype != np.uint8:
        values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = np.percentile(values, PERCENTILES, axis=(0, 1))
        values = (np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)
    if values.shape[2] == 2:  # red and green
        return np.concatenate([values, np.zeros_like(values[:, :, :1])], axis=2)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values
