"""Pictures of many images with their captions, tinted images, and PNG files that are whole or absent."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from visbio_diffusers.files import whole_file


LINE = 13  # pixels
GAP = 8  # pixels


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, tile: int = 160, caption_lines: int = 4
) -> Image.Image:
    """Return one picture of `images`, enlarged or reduced to tiles, each above its caption.

    Args:
        images (`Sequence[PIL.Image.Image]`): of any size and mode.
        captions (`Sequence[str]`): one for each; wrapped, and cut with dots after `caption_lines`.
        columns (`int`): tiles in a row; fewer if there are fewer images.
        tile (`int`): longer side of a tile in pixels.
        caption_lines (`int`): lines kept free below a tile.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = tile + caption_lines * LINE + GAP
    sheet = Image.new("RGB", (columns * (tile + GAP), rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = (place % columns) * (tile + GAP) + GAP // 2, (place // columns) * height + GAP // 2
        scale = tile / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        sheet.paste(image.convert("RGB").resize(size, resample), (left, top))
        for number, line in enumerate(_wrap(caption, font, tile, caption_lines)):
            draw.text((left, top + tile + number * LINE), line, fill="black", font=font)
    return sheet


def sheet_of_rows(
    rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]], titles: tuple[str, str], tile: int = 64
) -> Image.Image:
    """Return one picture of images side by side with others, a row for each thing that they show.

    Args:
        rows (`Sequence[tuple]`): what a row shows, which stands on its left, and the images of both sides.
        titles (`tuple[str, str]`): of the two sides.
        tile (`int`): side of an image in the picture, in pixels.
    """
    font = ImageFont.load_default(11)
    margin = max(round(font.getlength(label)) for label, _, _ in rows) + 2 * GAP
    starts = margin, margin + max(len(left) for _, left, _ in rows) * (tile + 2) + 2 * GAP
    width = starts[1] + max(len(right) for _, _, right in rows) * (tile + 2) + GAP
    sheet = Image.new("RGB", (width, 2 * GAP + LINE + len(rows) * (tile + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for start, title in zip(starts, titles, strict=True):
        draw.text((start, GAP // 2), title, fill="black", font=font)
    for row, (label, *sides) in enumerate(rows):
        top = GAP + LINE + row * (tile + 2)
        draw.text((GAP, top + tile // 2), label, fill="black", font=font, anchor="lm")
        for start, images in zip(starts, sides):
            for place, image in enumerate(images):
                fitted = image.convert("RGB").resize((tile, tile), Image.Resampling.NEAREST)
                sheet.paste(fitted, (start + place * (tile + 2), top))
    return sheet


def tint(image: Image.Image, strength: np.ndarray) -> Image.Image:
    """Return an image in grey, with red where `strength` (height, width), in [-1, 1], is above 0 and blue below."""
    base = np.asarray(image.convert("L"), np.float32)[:, :, None].repeat(3, axis=2)
    strength = strength[:, :, None]
    colour = np.where(strength > 0, [220.0, 30.0, 30.0], [30.0, 60.0, 220.0])
    return Image.fromarray((base + 0.6 * np.abs(strength) * (colour - base)).round().astype(np.uint8))


def data_url(picture: Image.Image) -> str:
    """Return a picture as the `src` of an HTML image that needs no file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG beside `path` and rename it, with `metadata` as text chunks, so that no half picture remains.

    Raises:
        OSError: if the disk is full or the folder not writable.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(png_bytes(image, metadata))


def png_bytes(image: Image.Image, metadata: dict[str, str] | None = None) -> bytes:
    """Return the content of a PNG file with `metadata` as text chunks."""
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int) -> list[str]:
    """Break a caption into lines of a tile's width; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."]
    return lines
