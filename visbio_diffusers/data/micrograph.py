"""Images and masks as microscopes and Cellpose save them: their values, and what the file says of their making."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

from visbio_diffusers.data.photograph import UNREADABLE, is_cut, is_plain
from visbio_diffusers.files import one_line


if TYPE_CHECKING:
    import tifffile

CHANNELS = 5  # the most that an image may have
MAX_BYTES = 2**29  # of an image that is decoded whole; others are read in place, tile by tile
PLAUSIBLE = 0.01, 10.0  # micrometres a pixel, through a microscope
MICROMETRES = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
MICRO_SIGNS = str.maketrans({"\u00b5": "u", "\u03bc": "u"})  # micro sign and Greek mu
TAG_UNITS = {2: 25400.0, 3: 10000.0}  # micrometres of an inch and a centimetre, by TIFF's ResolutionUnit
PLAIN_COMPRESSIONS = 1, 8, 32946, 32773  # none, deflate, PackBits: tifffile reads these, Pillow the others
ALPHA = 1, 2  # TIFF's ExtraSamples that are no channels
UNNAMED = re.compile(r"(ch|channel|c|image|track)?[\s:#_-]*\d{0,2}([:\s_-]+\d{1,2})*|.*[/\\].*|.{33,}", re.I)


class Micrograph(NamedTuple):
    """An image of one plane.

    Args:
        values (`np.ndarray` of shape `(height, width, channels)`): of any type; may lie in the file and not in memory.
        channel_names (`tuple[str, ...]`): one a channel, "" where unknown.
        pixel_size (`float`, *optional*): micrometres a pixel.
        magnification (`float`, *optional*): nominal, of the objective.
    """

    values: np.ndarray
    channel_names: tuple[str, ...]
    pixel_size: float | None = None
    magnification: float | None = None


def read_micrograph(path: Path) -> Micrograph:
    """Read an image: PNG, JPEG and whatever else Pillow reads, TIFF, OME-TIFF, and TIFF of ImageJ.

    Transparency is left out. Of a TIFF without names for its axes, the shortest axis, up to 5, is that of channels.
    Names of channels, pixel size and magnification are those of the OME-XML, else of ImageJ, else the resolution in
    inches or centimetres; pixel sizes out of 0.01 to 10 micrometres are those of printers and count as unknown, as do
    names such as "Channel 1". Uncompressed TIFF is not read but mapped into memory.

    Raises:
        ValueError: naming the file if it is damaged, no single plane, of more than 5 channels, or compressed and of
            more than 512 MB.
    """
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            return _read_tiff(path)
        values = _read_with_pillow(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return Micrograph(values, ("",) * values.shape[2])


def read_masks(path: Path) -> np.ndarray:
    """Read masks: integers `(height, width)`, 0 for background and one number for each object.

    Raises:
        ValueError: naming the file if it is damaged, or holds colours, floats, or numbers out of 0 to 65535.
    """
    try:
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise ValueError("its compression changes the numbers of the objects")
        if path.suffix.lower() in (".tif", ".tiff"):
            masks = _read_tiff(path, as_masks=True).values
        else:
            masks = _read_with_pillow(path, as_masks=True)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if masks.shape[2] != 1:
        raise ValueError(f"{path} has {masks.shape[2]} channels: masks are grey, 0 and 1 to N; save them by Cellpose")
    if masks.dtype.kind not in "iub":
        raise ValueError(f"{path} holds {masks.dtype} numbers: masks are whole ones, save them as 16-bit integers")
    if masks.dtype not in (np.uint8, np.uint16, np.bool_):
        low, high = masks.min(), masks.max()
        if low < 0:
            raise ValueError(f"{path} has the number {low}: masks are 0 for background and 1 to N, set it to 0")
        if high > 65535:
            raise ValueError(f"{path} has the number {high}, above 65535: cut the image, or number its objects anew")
    return masks[:, :, 0].astype(np.uint8) if masks.dtype == np.bool_ else masks[:, :, 0]


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else one_line(error)
    way_out = "replace or remove it"
    if isinstance(error, Image.DecompressionBombError):
        way_out = "save it as TIFF without compression and tiling, which is read piece by piece"
    return ValueError(f"cannot read {path} ({reason}): {way_out}")


def _read_with_pillow(path: Path, as_masks: bool = False) -> np.ndarray:
    with Image.open(path) as image:
        if is_cut(image):
            raise ValueError("a PNG of 16 bits in colour, of which Pillow reads 8: save it as TIFF")
        image.load()
        if not as_masks and not image.mode.startswith(("I", "F")):
            image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
        values = np.asarray(image)
    return values[:, :, None] if values.ndim == 2 else values


def _read_tiff(path: Path, as_masks: bool = False) -> Micrograph:
    import tifffile  # for those who use it

    with tifffile.TiffFile(path) as file:
        if not file.series:
            raise ValueError("it has no pages")
        series, page = file.series[0], file.pages.first
        inverted = page.photometric == 0 and not as_masks  # white is zero
        in_place = series.dataoffset is not None and not inverted
        if not in_place and series.nbytes > MAX_BYTES:
            raise ValueError(
                f"{series.nbytes / 2**20:,.0f} MB, compressed or scattered over the file, are more than"
                f" {MAX_BYTES / 2**20:,.0f}: save it without compression and tiling, which is read piece by piece"
            )
        foreign = page.compression not in PLAIN_COMPRESSIONS or page.predictor == 3
        coloured = page.colormap is not None and not as_masks
        if (foreign or coloured) and is_plain(path):
            values = _read_with_pillow(path, as_masks)
        else:
            values = _arrange(file.asarray(series=0, out="memmap" if in_place else None), series.axes)
            if inverted and values.dtype.kind == "u":
                values = np.iinfo(values.dtype).max - values
            if "S" in series.axes and page.extrasamples and page.extrasamples[-1] in ALPHA:
                values = values[:, :, :-1]
        if values.dtype.kind not in "biuf":
            raise ValueError(f"its values are {values.dtype}: save them as 16-bit integers")
        return Micrograph(values, *_read_facts(file, values.shape[2]))


def _arrange(values: np.ndarray, axes: str) -> np.ndarray:
    """Return values as height x width x channels.

    Raises:
        ValueError: if there are other axes.
    """
    kept = [place for place, length in enumerate(values.shape) if length > 1 or axes[place] in "YX"]
    shape, axes = [values.shape[place] for place in kept], "".join(axes[place] for place in kept)
    values = values.reshape(shape)
    channel = [place for place, axis in enumerate(axes) if axis in "CS"]
    if len(axes) == 3 and not channel and set(axes) - {*"YX"} <= {*"QI"} and min(shape) <= CHANNELS:
        channel = [int(np.argmin(shape))]
    if len(axes) == 2:
        return values[:, :, None]
    if len(axes) != 3 or len(channel) != 1:
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"a stack or series, axes {axes} of {sizes}, and no single plane: save one, or a projection")
    if shape[channel[0]] > CHANNELS:
        raise ValueError(f"{shape[channel[0]]} channels are more than {CHANNELS}: save those that matter")
    return np.moveaxis(values, channel[0], -1)


def _read_facts(file: tifffile.TiffFile, channels: int) -> tuple[tuple[str, ...], float | None, float | None]:
    """Return the names of the channels, the pixel size in micrometres, and the magnification."""
    names, size, magnification = [], None, None
    if file.ome_metadata:
        names, size, magnification = _read_ome(file.ome_metadata)
    elif file.imagej_metadata:
        labels = file.imagej_metadata.get("Labels", [])
        names = [labels] if isinstance(labels, str) else list(labels)
        size = _micrometres(1 / (_resolution(file) or np.inf), file.imagej_metadata.get("unit"))
    unit = TAG_UNITS.get(file.pages.first.resolutionunit)
    if size is None and unit and _resolution(file):
        size = unit / _resolution(file)
    known = len(names) == channels
    names = tuple("" if not known or UNNAMED.fullmatch(name.strip()) else name.strip() for name in names[:channels])
    plausible = size is not None and PLAUSIBLE[0] <= size <= PLAUSIBLE[1]
    return names if known else ("",) * channels, size if plausible else None, magnification


def _resolution(file: tifffile.TiffFile) -> float | None:
    """Return the pixels a unit of a TIFF, if it says so and they are as many along both sides."""
    horizontal, vertical = file.pages.first.resolution
    return float(horizontal) if horizontal > 0 and abs(vertical / horizontal - 1) < 0.01 else None


def _micrometres(size: float, unit: str | None) -> float | None:
    """Return a length in micrometres, or `None` if its unit is none or unknown."""
    factor = MICROMETRES.get((unit or "").replace("\\u00B5", "u").translate(MICRO_SIGNS).strip())
    return size * factor if factor and size > 0 else None


def _read_ome(text: str) -> tuple[list[str], float | None, float | None]:
    """Return names of channels, pixel size and magnification of the first image of OME-XML.

    Source: Open Microscopy Environment, OME schema 2016-06 (Pixels, Channel, Objective).
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return [], None, None
    image, pixels = root.find("{*}Image"), root.find("{*}Image/{*}Pixels")
    if pixels is None:
        return [], None, None
    names = [channel.get("Name") or channel.get("Fluor") or "" for channel in pixels.iterfind("{*}Channel")]
    sizes = [
        _micrometres(_number(pixels.get(f"PhysicalSize{axis}")) or 0.0, pixels.get(f"PhysicalSize{axis}Unit", "um"))
        for axis in "XY"
    ]
    square = None not in sizes and abs(sizes[1] / sizes[0] - 1) < 0.01
    used = image.find("{*}ObjectiveSettings")
    objectives = {each.get("ID"): each.get("NominalMagnification") for each in root.iterfind(".//{*}Objective")}
    magnification = objectives.get(used.get("ID")) if used is not None else None
    if used is None and len(objectives) == 1:
        (magnification,) = objectives.values()
    return names, sizes[0] if square else None, _number(magnification)


def _number(text: str | None) -> float | None:
    """Return a number above zero that is written as text, if it is one."""
    try:
        return float(text) if text and 0 < float(text) < np.inf else None
    except ValueError:
        return None
