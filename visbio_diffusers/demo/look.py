"""What the page's tabs for images of one's own do: describe, draw again, edit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from visbio_diffusers.alignment.describe import describe, read_candidates
from visbio_diffusers.data import fit_image
from visbio_diffusers.demo.models import (
    MAX_SEED,
    Models,
    check_number,
    check_prompt,
    check_whole,
    heard_warnings,
    read_upload,
)
from visbio_diffusers.files import digest
from visbio_diffusers.redrawing import edit, fit_picture, reconstruct


class Said(NamedTuple):
    """What is said of an image.

    Args:
        seen (`PIL.Image.Image`): the image as the model looks at it.
        probabilities (`dict[str, float]`): of the captions, the likeliest first.
        doubt (`str`): why none of them fits; empty where one does.
    """

    seen: Image.Image
    probabilities: dict[str, float]
    doubt: str


class Redrawn(NamedTuple):
    """An upload as the model sees it, what was drawn of it, the text chunks of that PNG, and warnings."""

    given: Image.Image
    drawn: Image.Image
    record: dict[str, str]
    warnings: list[str]


def describe_upload(models: Models, file: str | None) -> Said:
    """Say what an uploaded image shows, as `visbio describe` does.

    Raises:
        ValueError: if there is no image, or it cannot be read.
    """
    picture = read_upload(file)
    encoder = models.encoder
    seen = fit_image(picture, encoder.resolution)
    candidates = read_candidates(encoder.caption_bank)
    (said,) = describe(encoder, encoder.features([seen]), list(candidates.values()))
    names = list(candidates)
    return Said(Image.fromarray(seen), {names[k]: probability for k, probability in said.ranking}, said.doubt)


def reconstruct_upload(
    models: Models,
    file: str | None,
    strength: float = 0.4,
    prompt: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> Redrawn:
    """Draw an uploaded image again, as `visbio reconstruct` does.

    Raises:
        ValueError: for an image that cannot be read, and for arguments beyond the page's limits.
    """
    picture = read_upload(file)
    check_number("strength", strength, 0, 1)
    check_whole("seed", seed, 0, MAX_SEED)
    wanted = {"prompt": check_prompt(prompt, allow_empty=True), "strength": float(strength), "seed": int(seed)}
    return _redraw(models, reconstruct, file, picture, wanted, steps, guidance_scale)


def edit_upload(
    models: Models,
    file: str | None,
    source: str,
    target: str,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> Redrawn:
    """Edit an uploaded image from one text to another, as `visbio edit` does.

    Raises:
        ValueError: for an image that cannot be read, and for arguments beyond the page's limits.
    """
    picture = read_upload(file)
    wanted = {"source": check_prompt(source, "text of what it shows")}
    wanted |= {"target": check_prompt(target, "text of what it is to show")}
    return _redraw(models, edit, file, picture, wanted, steps, guidance_scale)


def _redraw(models, function, file, picture, wanted, steps, guidance_scale) -> Redrawn:
    with models.studio(steps=steps, guidance_scale=guidance_scale) as studio, heard_warnings() as warnings:
        facts = {**models.facts, "image_sha256": digest(Path(file))}
        call = {name: studio.call[name] for name in ("num_inference_steps", "guidance_scale")}
        drawn, record = function(studio.pipe, facts, picture, **wanted, **call)
        return Redrawn(fit_picture(studio.pipe, picture), drawn, record, warnings)
