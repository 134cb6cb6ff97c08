"""What the page's voting tab does: two images of a prompt, and which of them a visitor prefers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from visbio_diffusers.demo.draw import draw_images
from visbio_diffusers.demo.models import MAX_SEED, Models, check_choice
from visbio_diffusers.grid import png_bytes
from visbio_diffusers.preferences import add_preference


PAIRS = "pairs.jsonl"
CHOICES = ("left", "right", "skip")
MAX_NAME = 40  # characters


class Pair(NamedTuple):
    """Two images of a prompt, with the text chunks of their PNGs; the first is shown on the left."""

    prompt: str
    images: list[Image.Image]
    records: list[dict[str, str]]


def draw_pair(models: Models, prompt: str, **settings) -> Pair:
    """Draw a prompt from two seeds at random.

    Args:
        settings: of [`draw_images`].

    Raises:
        ValueError: see [`draw_images`].
    """
    seed = random.SystemRandom().randrange(MAX_SEED)
    drawing = draw_images(models, prompt, 2, seed, **settings)
    return Pair(prompt.strip(), drawing.images, drawing.records)


def vote(folder: Path, pair: Pair | None, choice: str, who: str = "") -> bool:
    """Keep a vote in the folder, as [`add_preference`] does, and return whether there was one to keep.

    Args:
        folder (`Path`): gets pairs.jsonl and images/.
        pair (`Pair`, *optional*): what was voted on.
        choice (`str`): one of [`CHOICES`]; of a pair that is skipped nothing is kept.
        who (`str`): a nickname, of which the first MAX_NAME characters are kept; may be empty.

    Raises:
        ValueError: if there is no pair, or no such choice.
        OSError: if it cannot be written.
    """
    check_choice("vote", choice, CHOICES)
    if pair is None:
        raise ValueError("there are no two images to choose from: draw a pair first")
    if choice == "skip":
        return False
    left, right = (png_bytes(*each) for each in zip(pair.images, pair.records))
    better, worse = (left, right) if choice == "left" else (right, left)
    who = "".join(letter for letter in str(who or "") if letter.isprintable()).strip()
    add_preference(folder / PAIRS, pair.prompt, better, worse, who[:MAX_NAME])
    return True
