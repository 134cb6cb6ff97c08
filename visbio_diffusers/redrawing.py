"""Images drawn again, edited and restored, as the commands of these names write them, and what their PNGs say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioPipeline, VisBioRestorationPipeline, __version__
from visbio_diffusers.data import fit_image
from visbio_diffusers.data.noise import estimate_noise_std


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
    return _side_by_side([given, *drawn]), _record("edited", {"source": source, "prompt": target, **call}, facts)


def restore(
    pipe: VisBioPipeline,
    facts: dict[str, str],
    picture: Image.Image,
    prompt: str = "",
    factor: int = 1,
    noise_std: float | None = None,
    num_images: int = 1,
    seed: int = 0,
    **call: Any,
) -> tuple[Image.Image, dict[str, str]]:
    """Draw what an image may have been before it was reduced and noised.

    Args:
        pipe, facts, picture, prompt: see [`reconstruct`]; the image is brought to the size of the model over `factor`.
        factor (`int`), noise_std (`float`): see [`VisBioRestorationPipeline`]; the noise is estimated if not given.
        num_images (`int`): samples.
        seed (`int`): of the first sample; the next has the next.
        call: arguments of [`VisBioRestorationPipeline`], in JSON's types.

    Returns:
        The sample, or of several all of them, their mean and their standard deviation side by side; and the text
        chunks of its PNG, among them the `noise_std` that was taken.

    Raises:
        ValueError: for what the pipeline refuses.
    """
    given = fit_picture(pipe, picture, factor)
    noise_std = estimate_noise_std(np.asarray(given)) if noise_std is None else noise_std
    degradation = {"factor": factor, "noise_std": noise_std}
    generators = [torch.Generator().manual_seed(seed + number) for number in range(num_images)]
    sampling = {**degradation, "num_images_per_prompt": num_images, "generator": generators, **call}
    drawn = VisBioRestorationPipeline(**pipe.components)(prompt or None, given, **sampling).images
    parameters = {"prompt": prompt, "seed": seed, "num_images": num_images, **degradation, **call}
    said = f"mean of {factor} x {factor} pixels + Gaussian noise of std {noise_std:.4g} of white"
    return _side_by_side([*drawn, *_summary(drawn)]), _record("restored", parameters, {**facts, "degradation": said})


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


def fit_picture(pipe: VisBioPipeline, picture: Image.Image, factor: int = 1) -> Image.Image:
    """Return the middle square of an image with the channels of the model, at its size over `factor`."""
    channels = pipe.unet.config.in_channels
    pixels = fit_image(picture, max(1, pipe.unet.config.sample_size // factor), channels)
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
