"""Images drawn again and edited, as `visbio reconstruct` and `visbio edit` write them, and what their PNGs say."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioPipeline, __version__
from visbio_diffusers.data import fit_image


def reconstruct(
    pipe: VisBioPipeline,
    facts: dict[str, str],
    picture: Image.Image,
    prompt: str = "",
    strength: float = 0.4,
    seed: int = 0,
    **call: Any,
) -> tuple[Image.Image, dict[str, str]]:
    """Draw an image again from a noised copy of it.

    Args:
        pipe (`VisBioPipeline`): draws.
        facts (`dict[str, str]`): about the model and the image, for the record.
        picture (`PIL.Image.Image`): of any size, whose middle square is drawn, see [`fit_picture`].
        prompt (`str`): "" draws without text.
        strength (`float`): see [`VisBioImg2ImgPipeline`].
        seed (`int`): of the noise.
        call: arguments of [`VisBioImg2ImgPipeline`], in JSON's types.

    Returns:
        The image, and the text chunks of its PNG.

    Raises:
        ValueError: for what the pipeline refuses.
    """
    given = fit_picture(pipe, picture)
    text = {"prompt": prompt} if prompt else {"prompt_embeds": pipe.encode_prompt("")[0]}
    generator = torch.Generator().manual_seed(seed)
    redraw = VisBioImg2ImgPipeline(**pipe.components)
    drawn = redraw(**text, image=given, strength=strength, generator=generator, **call).images[0]
    return drawn, _record("redrawn", {"prompt": prompt, "seed": seed, "strength": strength, **call}, facts)


def edit(
    pipe: VisBioPipeline, facts: dict[str, str], picture: Image.Image, source: str, target: str, **call: Any
) -> tuple[Image.Image, dict[str, str]]:
    """Invert an image with one text and draw it with another.

    Args:
        pipe, facts, picture: see [`reconstruct`].
        source (`str`), target (`str`): what the image shows, and what it is to show.
        call: arguments of [`VisBioPipeline`] and of [`VisBioImg2ImgPipeline.invert`], in JSON's types.

    Returns:
        Three squares side by side, the image, the image drawn with the first text and with the second; and the text
        chunks of its PNG.

    Raises:
        ValueError: for what the pipeline refuses.
    """
    given = fit_picture(pipe, picture)
    settings = {"clip_sample": False, "thresholding": False}
    parts = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config, **settings)}
    latents = VisBioImg2ImgPipeline(**parts).invert(given, source, **call)
    drawn = VisBioPipeline(**parts)([source, target], latents=latents.expand(2, -1, -1, -1), **call).images
    sheet = Image.new(drawn[0].mode, (3 * given.width, given.height))
    for column, each in enumerate((given, *drawn)):
        sheet.paste(each, (column * given.width, 0))
    return sheet, _record("edited", {"source": source, "prompt": target, **call}, facts)


def fit_picture(pipe: VisBioPipeline, picture: Image.Image) -> Image.Image:
    """Return the middle square of an image at the size and with the channels of the model."""
    channels = pipe.unet.config.in_channels
    pixels = fit_image(picture, pipe.unet.config.sample_size, channels)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def _record(done: str, parameters: dict[str, Any], facts: dict[str, str]) -> dict[str, str]:
    facts = {**facts, "version": __version__}
    return {
        "Description": f"Synthetic image {done} by the model {facts['model']}: {parameters['prompt']}".rstrip(": "),
        "Software": f"visbio_diffusers {__version__}",
        "synthetic": "true",
        **{name: str(value) for name, value in parameters.items()},
        **facts,
        "parameters": json.dumps({"synthetic": True, "call": parameters, **facts}, ensure_ascii=False),
    }
