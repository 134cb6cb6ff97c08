"""What `visbio reconstruct` and `visbio edit` draw, and what their PNGs say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, __version__
from visbio_diffusers.data import fit_image
from visbio_diffusers.data.photograph import read_photograph
from visbio_diffusers.files import digest
from visbio_diffusers.grid import save_png
from visbio_diffusers.load import load_pipeline


def reconstruct(
    image: Path,
    output: Path,
    prompt: str = "",
    strength: float = 0.4,
    seed: int = 0,
    model: str | None = None,
    device: str | None = None,
    **call: Any,
) -> None:
    """Draw an image again from a noised copy of it, and write it as PNG.

    Args:
        image (`Path`): of any size, whose middle square is drawn.
        output (`Path`): the PNG.
        prompt (`str`): "" draws without text.
        strength (`float`): see [`VisBioImg2ImgPipeline`].
        seed (`int`): of the noise.
        model (`str`, *optional*), device (`str`, *optional*): see `load_pipeline`.
        call: arguments of [`VisBioImg2ImgPipeline`], in JSON's types.

    Raises:
        ValueError, OSError: for what cannot be read, loaded, drawn or written.
    """
    pipe, facts, given = _open(image, model, device)
    text = {"prompt": prompt} if prompt else {"prompt_embeds": pipe.encode_prompt("")[0]}
    generator = torch.Generator().manual_seed(seed)
    redraw = VisBioImg2ImgPipeline(**pipe.components)
    drawn = redraw(**text, image=given, strength=strength, generator=generator, **call).images[0]
    parameters = {"prompt": prompt, "seed": seed, "strength": strength, **call}
    _save(drawn, output, image, "redrawn", parameters, facts)


def edit(
    image: Path,
    output: Path,
    source: str,
    target: str,
    model: str | None = None,
    device: str | None = None,
    **call: Any,
) -> None:
    """Invert an image with one text and draw it with another; write it, drawn with the first and with the second.

    Args:
        image (`Path`), output (`Path`), model (`str`), device (`str`): see [`reconstruct`].
        source (`str`), target (`str`): what the image shows, and what it is to show.
        call: arguments of [`VisBioPipeline`] and of [`VisBioImg2ImgPipeline.invert`], in JSON's types.

    Raises:
        ValueError, OSError: for what cannot be read, loaded, drawn or written.
    """
    pipe, facts, given = _open(image, model, device)
    settings = {"clip_sample": False, "thresholding": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    inverter = VisBioImg2ImgPipeline(**pipe.components)
    latents = inverter.invert(given, source, **call)
    drawn = pipe([source, target], latents=latents.expand(2, -1, -1, -1), **call).images
    sheet = Image.new(drawn[0].mode, (3 * given.width, given.height))
    for column, each in enumerate((given, *drawn)):
        sheet.paste(each, (column * given.width, 0))
    _save(sheet, output, image, "edited", {"source": source, "prompt": target, **call}, facts)


def _open(image, model, device):
    picture = read_photograph(image)
    pipe, facts = load_pipeline(model, device)
    channels = pipe.unet.config.in_channels
    pixels = fit_image(picture, pipe.unet.config.sample_size, channels)
    return pipe, facts, Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def _save(drawn, output, image, done, parameters, facts):
    facts = {**facts, "image_sha256": digest(image), "version": __version__}
    metadata = {
        "Description": f"Synthetic image {done} by the model {facts['model']}: {parameters['prompt']}".rstrip(": "),
        "Software": f"visbio_diffusers {__version__}",
        "synthetic": "true",
        **{name: str(value) for name, value in parameters.items()},
        **facts,
        "parameters": json.dumps({"synthetic": True, "call": parameters, **facts}, ensure_ascii=False),
    }
    save_png(drawn, output, metadata)
