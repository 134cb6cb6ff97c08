"""One step of sampling as a Gaussian policy: where the next sample may lie, and how likely it was to lie there.

The steps are those of `diffusers.DDIMScheduler` with noise (`eta` above 0), with which reward fine-tuning samples.
"""

from typing import Literal, NamedTuple

import torch


class Gaussian(NamedTuple):
    """Independent normal distributions, one for each value of a batch of samples.

    Args:
        mean (`torch.Tensor` of shape `(batch, ...)`): centre.
        std (`torch.Tensor` of shape `(batch, 1, ...)`): standard deviation, 0 where the next sample is certain.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the sample to which standard normal `noise` of the shape of the mean leads."""
        return self.mean + self.std * noise

    def log_prob(self, sample: torch.Tensor, reduction: Literal["mean", "sum"]) -> torch.Tensor:
        """Return the log-density of samples, `(batch,)`, as the sum over their values or as its mean.

        A range within which a ratio may move means different things for the two: with `mean` it is as many times
        wider as a sample has values. A step without noise has no density: leave it out (`stochastic_timesteps`).

        Args:
            sample (`torch.Tensor` of the shape of the mean): the very tensor that was stored, since rounding it alone
                moves the ratio of a policy to itself away from 1.
            reduction (`str`): "sum" or "mean".
        """
        normal = torch.distributions.Normal(self.mean, self.std.expand_as(self.mean), validate_args=False)
        log_probs = normal.log_prob(sample).flatten(1)
        return log_probs.sum(dim=1) if reduction == "sum" else log_probs.mean(dim=1)

    def kl(self, base: "Gaussian") -> torch.Tensor:
        """Return the Kullback-Leibler divergence to a distribution of equal std, over all values, `(batch,)`."""
        return ((self.mean - base.mean) / self.std).square().flatten(1).sum(dim=1) / 2


def reverse_step(
    scheduler, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor, eta: float = 1.0
) -> Gaussian:
    """Return the distribution of the next sample, each at a timestep of its own.

    Args:
        scheduler (`DDIMScheduler`): after `set_timesteps`, without thresholding or clipping, which cut gradients off.
        model_output, sample (`torch.Tensor` of shape `(batch, channels, height, width)`): what the model predicts, as
            the scheduler's `prediction_type` says, for these noised samples.
        timesteps (`torch.Tensor` of shape `(batch,)`): int64, of `scheduler.timesteps`.
        eta (`float`): share of the noise that would undo none of the steps; 0 is DDIM without noise, 1 is DDPM.

    Raises:
        ValueError: if the scheduler clips or thresholds samples.

    Source: Song et al. 2021, Denoising Diffusion Implicit Models, equations 12 and 16.
    """
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError("the scheduler clips samples, which cuts gradients off: unset clip_sample and thresholding")
    alpha, previous = (each.to(sample)[:, None, None, None] for each in _alphas(scheduler, timesteps))
    if scheduler.config.prediction_type == "v_prediction":
        clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
        noise = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
    elif scheduler.config.prediction_type == "epsilon":
        clean, noise = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt(), model_output
    else:
        clean, noise = model_output, (sample - alpha.sqrt() * model_output) / (1 - alpha).sqrt()
    std = eta * _variance(alpha, previous).sqrt()
    direction = (1 - previous - std.square()).clamp(min=0).sqrt()
    return Gaussian(previous.sqrt() * clean + direction * noise, std)


def stochastic_timesteps(scheduler, eta: float = 1.0) -> torch.Tensor:
    """Return those of `scheduler.timesteps` that draw noise, without the last.

    That one has none, and so no density, or where the steps do not divide the schedule, so little that it would
    outweigh all others.
    """
    timesteps = scheduler.timesteps[:-1]
    return timesteps[eta * _variance(*_alphas(scheduler, timesteps)) > 0]


def _alphas(scheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of the image in the variance at timesteps, and at those that follow in sampling."""
    table = scheduler.alphas_cumprod.to(timesteps.device)
    following = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = scheduler.final_alpha_cumprod.to(table)
    return table[timesteps], torch.where(following >= 0, table[following.clamp(min=0)], last)


def _variance(alpha: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    return ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).clamp(min=0)
