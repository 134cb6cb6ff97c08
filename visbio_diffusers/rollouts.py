"""Images drawn by the policy that is trained, with what is needed to train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch.nn.utils.rnn import pad_sequence

from visbio_diffusers import VisBioPipeline, VisBioUNet
from visbio_diffusers.policy import Gaussian, reverse_step, stochastic_timesteps
from visbio_diffusers.text import text_mask


class Text(NamedTuple):
    """Hidden states of captions and of the empty text, `(n, tokens, width)`; bool masks `(n, tokens)`, or None."""

    states: torch.Tensor
    mask: torch.Tensor | None
    empty_states: torch.Tensor
    empty_mask: torch.Tensor | None

    def rows(self, rows) -> Text:
        """Return those of some of the captions."""
        return Text(*(None if each is None else each[rows] for each in self))


class Rollout(NamedTuple):
    """Images and steps that led to them; all of float32, so that a ratio on policy is 1.

    Args:
        samples (`torch.Tensor` of shape `(n, channels, height, width)`): where the last step led.
        timesteps (`torch.Tensor` of shape `(steps,)`): those kept.
        before, after (`torch.Tensor` of shape `(steps, n, channels, height, width)`): samples around each of them.
        log_probs (`torch.Tensor` of shape `(steps, n)`): of the latter, when they were drawn.
    """

    samples: torch.Tensor
    timesteps: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    log_probs: torch.Tensor


class Policy(NamedTuple):
    """How images are drawn: the settings of rollouts and of training on them.

    Args:
        scheduler (`DDIMScheduler`): after `set_timesteps`, see [`make_policy`].
        guidance_scale (`float`): 1 is without guidance, at half the cost.
        eta (`float`): share of noise in each step.
        reduction (`str`): "mean" or "sum" of log-probabilities over the values of a sample.
        train_empty (`bool`): let gradients flow through the empty text too; without, a third of a step is saved.
    """

    scheduler: DDIMScheduler
    guidance_scale: float = 1.0
    eta: float = 1.0
    reduction: str = "mean"
    train_empty: bool = False

    @property
    def stochastic(self) -> torch.Tensor:
        """Timesteps that draw noise; the last seldom does."""
        return stochastic_timesteps(self.scheduler, self.eta)

    def step(self, unet, sample: torch.Tensor, timesteps: torch.Tensor, text: Text, caches=None) -> Gaussian:
        """Return the distribution of the next samples.

        Args:
            unet: called as `VisBioUNet.forward` is.
            sample (`torch.Tensor` of shape `(n, channels, height, width)`), timesteps (`(n,)`): noised images.
            text (`Text`): their captions.
            caches (`tuple[dict, dict]`, *optional*): `text_cache` of both texts, for a `VisBioUNet` without gradients.
        """
        output = predict(unet, sample, timesteps, text, self.guidance_scale, caches, self.train_empty)
        return reverse_step(self.scheduler, output.float(), timesteps, sample, self.eta)


def make_policy(scheduler, steps: int, guidance_scale: float, eta: float, reduction: str) -> Policy:
    """Return the policy of a pipeline's noise schedule: DDIM steps, without clipping, which cuts gradients off."""
    found = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    found.set_timesteps(steps)
    return Policy(found, guidance_scale, eta, reduction)


def predict(
    unet, sample, timesteps, text: Text, guidance_scale: float, caches=None, train_empty: bool = False
) -> torch.Tensor:
    """Return what the model predicts, guided; arguments as in [`Policy.step`]."""
    first, second = ({"text_cache": each} for each in caches) if caches else ({}, {})
    conditional = unet(
        sample, timesteps, encoder_hidden_states=text.states, encoder_attention_mask=text.mask, return_dict=False,
        **first,
    )[0]  # fmt: skip
    if guidance_scale == 1:
        return conditional
    with torch.set_grad_enabled(train_empty and torch.is_grad_enabled()):
        empty = unet(
            sample, timesteps, encoder_hidden_states=text.empty_states, encoder_attention_mask=text.empty_mask,
            return_dict=False, **second,
        )[0]  # fmt: skip
    return torch.lerp(empty, conditional, guidance_scale)


@torch.no_grad()
def encode_prompts(pipe, prompts: Sequence[str], batch_size: int = 256) -> Text:
    """Return the text of prompts, on the device of the pipeline's UNet.

    Args:
        pipe (`VisBioPipeline` or `StableDiffusionPipeline`): with its text encoder.
        prompts (`Sequence[str]`): n texts.
    """
    device, parts = pipe.unet.device, []
    for start in range(0, len(prompts), batch_size):
        states, empty = pipe.encode_prompt(list(prompts[start : start + batch_size]), device, 1, True)
        parts.append((states.float(), empty.float()))
    states, empty = (pad_sequence([row for part in parts for row in part[k]], batch_first=True) for k in range(2))
    if isinstance(pipe, VisBioPipeline):
        return Text(states, text_mask(states), empty, text_mask(empty))
    return Text(states, None, empty, None)


def decoder(pipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes images in [-1, 1] of samples, `(n, channels, height, width)`: the VAE, or nothing."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return lambda samples: samples
    return lambda samples: vae.decode(samples / vae.config.scaling_factor, return_dict=False)[0]


@torch.no_grad()
def collect(
    unet,
    policy: Policy,
    text: Text,
    generator: torch.Generator,
    kept: Sequence[int] = (),
    until: int | None = None,
    batch_size: int = 64,
) -> Rollout:
    """Draw one image for each caption, and keep some of the steps.

    Args:
        unet: on its device, in evaluation mode.
        policy (`Policy`): how.
        text (`Text`): n captions.
        generator (`torch.Generator`): on the CPU; the only source of randomness.
        kept (`Sequence[int]`): timesteps to keep, of `policy.stochastic`.
        until (`int`, *optional*): stop before so many of the last steps.
        batch_size (`int`): images drawn together.
    """
    size, device = (unet.config.in_channels, *_sides(unet.config.sample_size)), text.states.device
    timesteps = policy.scheduler.timesteps[: len(policy.scheduler.timesteps) - (until or 0)]
    noises = torch.randn(len(timesteps) + 1, len(text.states), *size, generator=generator)
    parts = []
    for start in range(0, len(text.states), batch_size):
        rows = slice(start, start + batch_size)
        own, caches = text.rows(rows), ({}, {}) if isinstance(unet, VisBioUNet) else None
        sample, steps = noises[0, rows].to(device), []
        for index, timestep in enumerate(timesteps.tolist()):
            gaussian = policy.step(unet, sample, torch.full((len(sample),), timestep, device=device), own, caches)
            after = gaussian.sample(noises[index + 1, rows].to(device))
            if timestep in kept:
                steps.append((sample, after, gaussian.log_prob(after, policy.reduction)))
            sample = after
        parts.append((sample, *map(torch.stack, zip(*steps))))
    samples = torch.cat([part[0] for part in parts])
    steps = [torch.cat(each, dim=1) for each in list(zip(*parts))[1:]] or [torch.empty(0)] * 3
    return Rollout(samples, torch.tensor([t for t in timesteps.tolist() if t in kept]), *steps)


def _sides(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
