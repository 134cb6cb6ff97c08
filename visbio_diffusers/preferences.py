"""Pairs of images of which one was preferred, as people or programs have judged them.

A file of pairs is JSON lines: {"prompt": ..., "image_w": FILE, "image_l": FILE, "who": ..., "when": ...}, image_w
being the better one; files are named from the folder of the JSON lines, and `who` and `when` may be left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from visbio_diffusers.data.dataset import fit_image
from visbio_diffusers.files import whole_file


logger = logging.getLogger(__name__)


class Preferences(NamedTuple):
    """Prompts, and the better and the worse image of each, uint8 `(n, height, width, channels)`."""

    prompts: list[str]
    better: np.ndarray
    worse: np.ndarray


def load_preferences(file: str | Path, resolution: int, channels: int = 3) -> Preferences:
    """Read pairs, their images in one size. A last line that was cut short while it was written is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no pair, or its images cannot be read; the message names the line.
    """
    file = Path(file)
    prompts, images = [], []
    lines = file.read_text(encoding="utf-8").split("\n")
    if _is_cut(lines[-1]):
        logger.warning("%s line %d was cut short and is left out", file, len(lines))
        lines.pop()
    for number, line in enumerate(lines, 1):
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


def add_preference(file: str | Path, prompt: str, better: bytes, worse: bytes, who: str = "") -> None:
    """Append a pair to a file of pairs, of which any number of threads and processes may do so at a time.

    The images are written first, to images/ beside the file, under the digests of their content; then comes the line,
    which is on the disk when this returns. What a killed writer left of a line is removed by the next one.

    Args:
        file (`str` or `Path`): made if need be, with its folder.
        prompt (`str`): what both images were drawn from.
        better, worse (`bytes`): PNG files.
        who (`str`): who says so; left out where empty.

    Raises:
        OSError: if the disk is full or the folder not writable.
    """
    file = Path(file)
    names = [f"images/{hashlib.sha256(image).hexdigest()}.png" for image in (better, worse)]
    pair = {"prompt": prompt, "image_w": names[0], "image_l": names[1], **({"who": who} if who else {})}
    pair["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            for name, image in zip(names, (better, worse)):
                if not (file.parent / name).exists():
                    with whole_file(file.parent / name) as temporary:
                        temporary.write_bytes(image)
            _append(file, json.dumps(pair))  # in ASCII, so that wherever a line is cut it can be read
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror or error}; choose a place where you may write") from error


def _append(file: Path, line: str) -> None:
    with file.open("a+b") as stream:
        stream.seek(0)
        content = stream.read()
        start = content.rfind(b"\n") + 1
        last = content[start:].decode("utf-8", "replace")
        if _is_cut(last):
            stream.truncate(start)
        elif last:  # whole, but for its end
            line = f"\n{line}"
        stream.write(f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def _is_cut(last: str) -> bool:
    """Return whether what stands after the last line end of a file is a part of a line."""
    try:
        return bool(last.strip()) and not isinstance(json.loads(last), dict)
    except ValueError:
        return True


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
