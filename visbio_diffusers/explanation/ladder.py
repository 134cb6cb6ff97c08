"""From noise to image: what a model sees in an image under more and more noise, at once and after all its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.grid import contact_sheet
from visbio_diffusers.rollouts import encode_prompts, make_policy, predict


LEVELS = 0.2, 0.4, 0.6, 0.8, 1.0


class Rung(NamedTuple):
    """An image under noise of one level, and what becomes of it.

    Args:
        timestep (`int`): of the noise, nearest to the wanted level among those of the sampling.
        signal (`float`): share of the image in the variance of the noised one, in [0, 1].
        noised (`PIL.Image.Image`): what the model is given, clipped to the range of images.
        one_step (`PIL.Image.Image`): its first prediction of the clean image.
        reconstruction (`PIL.Image.Image`): the image after all steps from there.
    """

    timestep: int
    signal: float
    noised: Image.Image
    one_step: Image.Image
    reconstruction: Image.Image


@torch.no_grad()
def denoising_ladder(
    pipe: VisBioPipeline,
    image: Image.Image,
    prompt: str,
    levels: Sequence[float] = LEVELS,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.35,
    seed: int = 0,
) -> list[Rung]:
    """Noise an image to several levels, the same noise for all, and denoise it from each, by DDIM without noise.

    Args:
        pipe (`VisBioPipeline`): on its device.
        image (`PIL.Image.Image`): drawn or real, of a size that the model draws.
        prompt (`str`): with which it is denoised.
        levels (`Sequence[float]`): in (0, 1], timesteps as shares of the training timesteps; 1 is noise alone in a
            model of zero terminal SNR.
        num_inference_steps (`int`): of a whole sampling; a level of 0.4 takes 0.4 of them.
        guidance_scale (`float`): weight of the text, 1 is off.
        seed (`int`): of the noise.

    Raises:
        ValueError: for another kind of pipeline, a level out of range, or a size that the model does not draw.
    """
    if not isinstance(pipe, VisBioPipeline):
        raise ValueError(f"a {type(pipe).__name__} does not denoise pixels: the ladder needs a VisBioPipeline")
    if not all(0 < level <= 1 for level in levels):
        raise ValueError(f"levels of noise are above 0 and at most 1, but are {tuple(levels)}")
    scheduler = make_policy(pipe.scheduler, num_inference_steps, guidance_scale, 0.0, "mean").scheduler
    mode = "RGB" if pipe.unet.config.in_channels == 3 else "L"
    clean = pipe.image_processor.preprocess(image.convert(mode)).to(pipe.device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    text = encode_prompts(pipe, [prompt])
    marks = torch.tensor(levels) * scheduler.config.num_train_timesteps
    starts = (scheduler.timesteps[None] - marks[:, None]).abs().argmin(dim=1).tolist()
    rungs = []
    for start in tqdm(starts, desc="ladder", unit="level"):
        timesteps = scheduler.timesteps[start:].to(clean.device)
        sample = noised = scheduler.add_noise(clean, noise, timesteps[:1])
        predictions = []
        for timestep in timesteps:
            step = scheduler.step(predict(pipe.unet, sample, timestep, text, guidance_scale), timestep, sample)
            sample = step.prev_sample
            predictions.append(step.pred_original_sample)
        first = int(timesteps[0])
        shown = pipe.image_processor.postprocess(torch.cat([noised, predictions[0], sample]), output_type="pil")
        rungs.append(Rung(first, float(scheduler.alphas_cumprod[first]), *shown))
    return rungs


def ladder_sheet(image: Image.Image, rungs: Sequence[Rung], tile: int = 112) -> Image.Image:
    """Return one picture of a ladder, a column for each level: noised, first prediction, reconstruction.

    Under the last two stands how far they are from `image`, as the root of the mean square in grey levels.
    """
    rows = [[], [], []]
    captions = [[], [], []]
    for rung in rungs:
        for row, shown in zip(rows, rung[2:], strict=True):
            row.append(shown)
        captions[0].append(f"given: {rung.signal:.0%} image, {1 - rung.signal:.0%} noise")
        captions[1].append(f"first guess, off by {_distance(rung.one_step, image):.0f}")
        captions[2].append(f"after all steps, off by {_distance(rung.reconstruction, image):.0f}")
    return contact_sheet(sum(rows, []), sum(captions, []), len(rungs), tile, caption_lines=2)


def _distance(image: Image.Image, other: Image.Image) -> float:
    pixels = [np.asarray(each.convert(image.mode), np.float64) for each in (image, other)]
    return float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2)))
