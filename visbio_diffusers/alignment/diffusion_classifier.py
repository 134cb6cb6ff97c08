"""The generator's opinion: the caption with which it denoises an image best is what the image shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.losses import denoising_errors
from visbio_diffusers.text import text_mask


TIMESTEPS = 0.1, 0.8  # of the schedule, between which noise tells captions apart


@torch.no_grad()
def denoising_evidence(
    pipe: VisBioPipeline,
    pixel_values: torch.Tensor,
    captions: Sequence[str],
    num_samples: int = 12,
    seed: int = 0,
    batch_size: int = 128,
) -> torch.Tensor:
    """Return how much worse each caption helps to denoise each image than the average caption, `(n, captions)`.

    All captions meet the same noise at the same timesteps, whose differences cancel.

    Args:
        pipe (`VisBioPipeline`): on the device to use.
        pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`): in [-1, 1], of a size that it draws.
        captions (`Sequence[str]`): what to choose from; the lowest number wins.
        num_samples (`int`): noises and timesteps.
        seed (`int`): of the noise.
        batch_size (`int`): images in one pass of the UNet.

    Source: Li et al. 2023, Your Diffusion Model is Secretly a Zero-Shot Classifier, section 3.
    """
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    states, _ = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)
    low, high = (share * scheduler.config.num_train_timesteps for share in TIMESTEPS)
    timesteps = torch.as_tensor(np.linspace(low, high, num_samples).round().astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(num_samples, *pixel_values.shape[1:], generator=generator)
    found = []
    for image in pixel_values:
        errors = []
        for start in range(0, num_samples, max(batch_size // len(captions), 1)):
            chosen = slice(start, start + max(batch_size // len(captions), 1))
            n = len(timesteps[chosen])
            repeat = len(captions)
            clean = image.expand(n * repeat, *image.shape).to(pipe.device)
            noise = noises[chosen].repeat_interleave(repeat, dim=0).to(pipe.device)
            steps = timesteps[chosen].repeat_interleave(repeat).to(pipe.device)
            text = states.repeat(n, 1, 1)
            error = denoising_errors(pipe.unet, scheduler, clean, noise, steps, text, text_mask(text))
            errors.append(error.view(n, repeat).cpu())
        errors = torch.cat(errors)  # (samples, captions)
        found.append((errors - errors.mean(dim=1, keepdim=True)).mean(dim=0))
    return torch.stack(found)
