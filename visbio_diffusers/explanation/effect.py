"""Where words are read and what they do in an image that is given, a photograph or a drawing.

The image is noised, and the model denoises it once from there: with the prompt, and with the prompt less one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.explanation.attribution import (
    WORD,
    AttentionRecorder,
    Attribution,
    merge_words,
    word_tokens,
)
from visbio_diffusers.rollouts import encode_prompts, predict
from visbio_diffusers.text import check_texts, max_tokens


LEVELS = 0.3, 0.45, 0.6, 0.75


class Effect(NamedTuple):
    """An image with a map for each word of a prompt: what the word does there.

    Args:
        image (`PIL.Image.Image`): as the model was given it, before noise.
        words (`list[str]`): of the prompt, in its order, as it spells them, without punctuation around them.
        maps (`np.ndarray` of shape `(words, height, width)`): float32, in grey levels of 255: how far the model's
            guess of the clean image changes when the word is left out, as the root of the mean square over noises and
            channels.
    """

    image: Image.Image
    words: list[str]
    maps: np.ndarray


class Noised(NamedTuple):
    """Noised copies of an image, `(n, channels, height, width)`, and their timesteps `(n,)`."""

    samples: torch.Tensor
    timesteps: torch.Tensor


@torch.no_grad()
def attribute_image(
    pipe: VisBioPipeline,
    image: Image.Image,
    prompt: str,
    levels: Sequence[float] = LEVELS,
    num_noises: int = 3,
    seed: int = 0,
) -> Attribution:
    """Return maps of where in a given image the words of a prompt are read: [`attribute_words`] of no drawing.

    Args:
        pipe (`VisBioPipeline`), image (`PIL.Image.Image`), prompt (`str`), levels (`Sequence[float]`), num_noises
            (`int`), seed (`int`): see [`word_effects`].

    Raises:
        ValueError: as [`word_effects`], and if the UNet has no cross-attention.
    """
    check_texts("prompt", prompt)
    words = word_tokens(pipe.tokenizer, prompt, max_tokens(pipe.tokenizer, pipe.text_encoder))
    noised = noise_image(pipe, image, levels, num_noises, seed)
    with AttentionRecorder(pipe.unet, len(noised.samples)) as recorder:
        _predict(pipe, noised, encode_prompts(pipe, [prompt]))
    found = recorder.token_maps(image.height, image.width).mean(dim=0)
    return merge_words(image, words, found)


@torch.no_grad()
def word_effects(
    pipe: VisBioPipeline,
    image: Image.Image,
    prompt: str,
    levels: Sequence[float] = LEVELS,
    num_noises: int = 3,
    seed: int = 0,
) -> Effect:
    """Return maps of what each word of a prompt does in a given image.

    The image is noised; a map says how far the model's guess of the clean image changes, at each pixel, when the word
    is left out of the prompt. That holds whichever way the text enters, cross-attention or FiLM, and has the
    resolution of the image.

    Args:
        pipe (`VisBioPipeline`): on its device, with LoRA adapters or without.
        image (`PIL.Image.Image`): drawn or real, of a size that the model draws.
        prompt (`str`): what the image shows.
        levels (`Sequence[float]`): of noise, in (0, 1], timesteps as shares of the training timesteps.
        num_noises (`int`): noises at each level.
        seed (`int`): of the noises.

    Raises:
        ValueError: for another kind of pipeline, a level out of range, a size that the model does not draw, or a
            prompt without a word.
    """
    check_texts("prompt", prompt)
    limit = max_tokens(pipe.tokenizer, pipe.text_encoder)
    words = [word for word, _ in word_tokens(pipe.tokenizer, prompt, limit)]
    noised = noise_image(pipe, image, levels, num_noises, seed)
    texts = encode_prompts(pipe, [prompt, *leave_out(prompt)[: len(words)]])
    guess, *others = [_guess(pipe, noised, texts.rows([row])) for row in range(len(texts.states))]
    maps = torch.stack([(other - guess).square().mean(dim=(0, 1)).sqrt() for other in others])
    return Effect(image, words, 127.5 * maps.float().cpu().numpy())


def leave_out(prompt: str) -> list[str]:
    """Return a prompt without its first word, without its second, and so on."""
    places = [word.span() for word in WORD.finditer(prompt)]
    return [" ".join((prompt[:start] + prompt[end:]).split()) for start, end in places]


def noise_image(pipe: VisBioPipeline, image: Image.Image, levels: Sequence[float], num_noises: int, seed: int) -> Noised:
    """Return an image under noise; arguments and errors as of [`word_effects`]."""
    if not isinstance(pipe, VisBioPipeline):
        raise ValueError(f"a {type(pipe).__name__} does not denoise pixels: images are explained by a VisBioPipeline")
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"levels of noise are above 0 and at most 1, but are {tuple(levels)}")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    last = scheduler.config.num_train_timesteps
    timesteps = torch.tensor([round(level * last) - 1 for level in levels]).clamp(min=0).repeat_interleave(num_noises)
    mode = "RGB" if pipe.unet.config.in_channels == 3 else "L"
    clean = pipe.image_processor.preprocess(image.convert(mode))
    noise = torch.randn(len(timesteps), *clean.shape[1:], generator=torch.Generator().manual_seed(seed))
    samples = scheduler.add_noise(clean.expand_as(noise), noise, timesteps)
    return Noised(samples.to(pipe.device, pipe.unet.dtype), timesteps.to(pipe.device))


def _predict(pipe: VisBioPipeline, noised: Noised, text) -> torch.Tensor:
    """Return what the UNet predicts from one text, which is read once."""
    return predict(pipe.unet, *noised, text.rows([0] * len(noised.samples)), 1.0)


def _guess(pipe: VisBioPipeline, noised: Noised, text) -> torch.Tensor:
    """Return the clean images, `(n, channels, height, width)` in [-1, 1], as far as they depend on the text."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    signal = scheduler.alphas_cumprod.to(noised.samples.device)[noised.timesteps].view(-1, 1, 1, 1)
    predicted = _predict(pipe, noised, text).float()
    if scheduler.config.prediction_type == "sample":
        return predicted
    return predicted * -((1 - signal).sqrt() if scheduler.config.prediction_type == "v_prediction" else (1 / signal - 1).sqrt())
