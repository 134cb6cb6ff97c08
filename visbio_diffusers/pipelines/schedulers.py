"""Which of Diffusers' schedulers can sample a VisBioUNet, and their timesteps."""

import inspect
from numbers import Real

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler


# These recover the spread of Gaussian data from its best denoiser (tests/test_pipeline_visbio.py).
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
# Their first steps are special ones, so that they go astray from the middle of the schedule.
FROM_NOISE = ("LMSDiscreteScheduler", "PNDMScheduler")
# Their steps pile up at the terminal timestep, where the noise level of a cosine schedule runs away.
UNFIT_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
# In the first step from zero terminal SNR DDIM takes the root of 1 - eta^2, times a positive number, that rounding can
# bring below 0 at eta 1, depending on the processor: all pixels would be NaN.
MAX_ETA = 1 - 1e-6
COSINE_SPACED = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # with which it was measured
COSINE_POWER = 3.5  # more crowds the steps more at the noisy end; 2 treats both ends alike
MAX_INIT_SIGMA = 5000.0  # Euler at zero terminal SNR starts at 4096; second-order steps from 20,000 go astray


def prepare_timesteps(
    scheduler,
    num_inference_steps: int,
    device: torch.device | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    spacing: str | None = None,
) -> torch.Tensor:
    """Set the steps of a scheduler that can sample this kind of model.

    Args:
        scheduler ([`SchedulerMixin`]): one of `SCHEDULERS`.
        num_inference_steps (`int`): spread as `spacing` says.
        device (`torch.device`, *optional*): of the result.
        timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*): instead, one or the other, in
            descending order, where the scheduler takes them.
        spacing (`str`, *optional*): "cosine" for [`cosine_timesteps`] with a scheduler of `COSINE_SPACED`; otherwise
            steps are even, as the scheduler is set to.

    Returns:
        `scheduler.timesteps`, descending.

    Raises:
        ValueError: if the scheduler does not take custom steps, or cannot sample this kind of model as it is set; for
            another spacing.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    if timesteps is not None and sigmas is not None:
        raise ValueError("give either `timesteps` or `sigmas`, not both")
    custom = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {argument: values for argument, values in custom.items() if values is not None}
    if not custom and (not isinstance(num_inference_steps, int) or num_inference_steps < 1):
        raise ValueError(f"`num_inference_steps` must be a whole number from 1, but is {num_inference_steps!r}")
    for argument in custom:
        if not _takes(scheduler, argument):
            raise ValueError(f"{name} takes no custom `{argument}`: use num_inference_steps")
    if spacing not in (None, "cosine"):
        raise ValueError(f'the timestep spacing of a pipeline is "cosine" or None, but is {spacing!r}')
    if spacing and not custom and name in COSINE_SPACED:
        custom = {"timesteps": cosine_timesteps(num_inference_steps, scheduler.config.num_train_timesteps)}
    if "timesteps" in custom and isinstance(scheduler, UniPCMultistepScheduler):
        _set_unipc_timesteps(scheduler, custom["timesteps"], device)
    else:
        scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
    sigma = float(scheduler.init_noise_sigma)
    if sigma > MAX_INIT_SIGMA:
        raise ValueError(
            f"{name} would start at noise level {sigma:.0f}, where it goes astray: create it with"
            f' {name}.from_config(pipe.scheduler.config, timestep_spacing="leading")'
        )
    return scheduler.timesteps


def cosine_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return timesteps that lie closest where there is nearly nothing but noise, and closer where there is little.

    The i-th of n is (T - 1) (1 - cos(pi / 2 (1 - i / n))^3.5), or the next that is not taken yet. Twelve such steps of
    UniPC come nearer to real images than twelve even ones (model_cards/EXPERIMENTS.md).

    Raises:
        ValueError: for more steps than there are timesteps.
    """
    if num_inference_steps > num_train_timesteps:
        raise ValueError(f"`num_inference_steps` must be at most {num_train_timesteps}, but is {num_inference_steps}")
    shares = np.arange(num_inference_steps, 0, -1) / num_inference_steps
    shares = 1 - np.cos(np.pi / 2 * shares) ** COSINE_POWER
    timesteps = ((num_train_timesteps - 1) * shares).round().astype(int).tolist()
    for i in range(1, num_inference_steps):
        timesteps[i] = max(min(timesteps[i], timesteps[i - 1] - 1), num_inference_steps - 1 - i)
    return timesteps


def _takes(scheduler, argument: str) -> bool:
    """Return whether steps can be set by `timesteps` or `sigmas`."""
    if isinstance(scheduler, UniPCMultistepScheduler):
        return argument == "timesteps"  # its own `sigmas` are for flow matching
    return argument in inspect.signature(scheduler.set_timesteps).parameters


def _set_unipc_timesteps(scheduler, timesteps: list[int], device: torch.device | None) -> None:
    """Set what UniPC in Diffusers 0.42 takes from the number of steps alone."""
    scheduler.set_timesteps(len(timesteps), device=device)
    scheduler.timesteps = torch.tensor(timesteps, device=device)
    alphas = scheduler.alphas_cumprod[timesteps].double().cpu()
    sigmas = torch.sqrt((1 - alphas) / alphas).float()
    scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])


def step_arguments(scheduler, eta: float, generator) -> dict:
    """Return those of the DDIM noise share `eta` (at most a millionth below 1) and `generator` that `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    given = {"eta": min(eta, MAX_ETA), "generator": generator}
    return {name: value for name, value in given.items() if name in takes}


def check_scheduler(scheduler) -> None:
    """Raise a ValueError with the way out unless the scheduler, as it is set, can sample this kind of model."""
    config, name = scheduler.config, type(scheduler).__name__
    prediction_type = config.get("prediction_type")
    known = any(base.__name__ in SCHEDULERS for base in type(scheduler).__mro__)
    if not known or prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{name} with prediction_type {prediction_type!r} is for another kind of model: use"
            f" {', '.join(SCHEDULERS[:4])} or {SCHEDULERS[4]}"
        )
    taken = inspect.signature(type(scheduler).__init__).parameters
    for spacing in UNFIT_SPACINGS:
        if spacing in taken and config[spacing]:
            raise ValueError(
                f"{name} with {spacing} spends its steps where there is nothing but noise: create it with"
                f" {name}.from_config(pipe.scheduler.config, {spacing}=False)"
            )
    if prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "a model that predicts noise (prediction_type 'epsilon') sees no image at zero terminal SNR: create the"
            f" scheduler with {name}.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)"
        )


def last_timesteps(scheduler, timesteps: torch.Tensor, strength: float, midway: bool = False) -> torch.Tensor:
    """Return the last of the timesteps of a scheduler, and have it begin there.

    Args:
        scheduler ([`SchedulerMixin`]): just set by [`prepare_timesteps`].
        timesteps (`torch.Tensor`): that it gave.
        strength (`float`): share of the steps, in [0, 1]; less than one step is none.
        midway (`bool`): whether something is to change between its steps even if `strength` is 1.

    Raises:
        ValueError: if `strength` is out of range, or the scheduler must see all steps.
    """
    if not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise ValueError(f"`strength` must be from 0 (keep the image) to 1 (ignore it), but is {strength!r}")
    name = type(scheduler).__name__
    if name in FROM_NOISE and (midway or strength < 1):
        raise ValueError(
            f"{name} cannot begin at an image: use {SCHEDULERS[0]}, {SCHEDULERS[2]} or {SCHEDULERS[3]}, created by"
            " from_config(pipe.scheduler.config)"
        )
    order = scheduler.order  # timesteps of each step but the last, which has one
    steps = -(-len(timesteps) // order)
    first = (steps - int(steps * strength)) * order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]
