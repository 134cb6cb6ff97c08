"""What `visbio reconstruct`, `visbio edit` and `visbio restore` draw, and what their PNGs say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioRestorationPipeline, __version__
from visbio_diffusers.data import fit_image
from visbio_diffusers.data.noise import estimate_noise_std
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
    _save(_side_by_side([given, *drawn]), output, image, "edited", {"source": source, "prompt": target, **call}, facts)


def restore(
    image: Path,
    output: Path,
    prompt: str = "",
    factor: int = 1,
    noise_std: float | None = None,
    num_images: int = 1,
    seed: int = 0,
    model: str | None = None,
    device: str | None = None,
    **call: Any,
) -> float:
    """Draw what an image may have been before it was reduced and noised, and write it as PNG.

    Args:
        image (`Path`), output (`Path`), prompt (`str`), model (`str`), device (`str`): see [`reconstruct`].
        factor (`int`), noise_std (`float`): see [`VisBioRestorationPipeline`]; the noise is estimated if not given.
        num_images (`int`): samples; of several the file has all, their mean and their standard deviation.
        seed (`int`): of the first sample; the next has the next.
        call: arguments of [`VisBioRestorationPipeline`], in JSON's types.

    Returns:
        The `noise_std` that was taken.

    Raises:
        ValueError, OSError: for what cannot be read, loaded, drawn or written.
    """
    pipe, facts, given = _open(image, model, device, factor)
    noise_std = estimate_noise_std(np.asarray(given)) if noise_std is None else noise_std
    degradation = {"factor": factor, "noise_std": noise_std}
    generators = [torch.Generator().manual_seed(seed + number) for number in range(num_images)]
    sampling = {**degradation, "num_images_per_prompt": num_images, "generator": generators, **call}
    drawn = VisBioRestorationPipeline(**pipe.components)(prompt or None, given, **sampling).images
    parameters = {"prompt": prompt, "seed": seed, "num_images": num_images, **degradation, **call}
    facts["degradation"] = f"mean of {factor} x {factor} pixels + Gaussian noise of std {noise_std:.4g} of white"
    _save(_side_by_side([*drawn, *_summary(drawn)]), output, image, "restored", parameters, facts)
    return noise_std


def _summary(drawn):
    """Return the mean of images and their standard deviation, if they are several."""
    if len(drawn) == 1:
        return []
    pixels = np.stack([np.asarray(each, np.float64) for each in drawn])
    spread = (4 * pixels.std(axis=0, ddof=1)).clip(0, 255)
    return [Image.fromarray(each.round().astype(np.uint8)) for each in (pixels.mean(axis=0), spread)]


def _side_by_side(images):
    sheet = Image.new(images[0].mode, (sum(each.width for each in images), images[0].height))
    for column, each in enumerate(images):
        sheet.paste(each, (column * each.width, 0))
    return sheet


def _open(image, model, device, factor=1):
    picture = read_photograph(image)
    pipe, facts = load_pipeline(model, device)
    channels = pipe.unet.config.in_channels
    pixels = fit_image(picture, max(1, pipe.unet.config.sample_size // factor), channels)
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
