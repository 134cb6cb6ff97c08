"""What a reward fine-tuning is told, and what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator

from visbio_diffusers.config import TrainConfig, flag
from visbio_diffusers.losses import denoising_errors
from visbio_diffusers.objectives import clipped_ratio_loss, score_function_loss
from visbio_diffusers.rewards import Reward
from visbio_diffusers.rollouts import Policy


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(TrainConfig):
    """Settings of reward fine-tuning, but for those of the adapter."""

    learning_rate: float = flag(3e-4, "highest learning rate of AdamW")
    use_ema: bool = flag(False, "average the weights over the training and keep the average")
    ema_decay: float = flag(0.95, "highest decay of the average; it starts low and rises")
    reward: str = flag("zero_shot", "what to raise: see visbio_diffusers/rewards.py; or module:function of your own")
    prompts: str = flag("bloodmnist", "caption bank, .txt file of one prompt a line, or captioned image set")
    heldout_prompts: str = flag("", ".txt file of prompts to watch; default: others of the bank, or those of training")
    heldout_reward: str = flag("", "a reward that is only watched, by another model; see patience")
    patience: int = flag(3, "end when the held-out reward is below its best so often while the other rises; 0 never")
    objective: Literal["clipped_ratio", "score_function", "matching", "draft"] = flag(
        "clipped_ratio", "DDPO-IS with PPO's clip, DDPO-SF, advantage-weighted denoising, or DRaFT-K"
    )
    num_rounds: int = flag(50, "rounds of drawing and training")
    num_prompts_per_round: int = flag(16, "prompts drawn from in each round, over all processes")
    num_images_per_prompt: int = flag(8, "images of each prompt, which are compared with each other")
    sample_steps: int = flag(20, "denoising steps of an image")
    train_timestep_fraction: float = flag(0.5, "share of the steps of an image that are trained on")
    draft_steps: int = flag(1, "last steps of an image that objective draft follows back")
    guidance_scale: float = flag(1.0, "weight of the text, in drawing and in training; 1 is off, at half the cost")
    train_empty_text: bool = flag(
        False, "follow gradients through the empty text too, as TRL did, at half as much again"
    )
    eta: float = flag(1.0, "share of noise in each step; 1 is DDPM")
    log_prob_reduction: Literal["mean", "sum"] = flag("mean", "of log-probabilities over the values of an image")
    clip_range: float = flag(1e-4, "how far a ratio may move from 1, on the scale of log_prob_reduction")
    adv_clip: float = flag(5.0, "largest advantage")
    baseline: Literal["group", "leave-one-out", "tracker"] = flag("group", "what a reward is compared with")
    kl_weight: float = flag(0.0, "weight of the divergence of each step from the base model")
    num_inner_epochs: int = flag(1, "times that a round is trained on")
    rollout_batch_size: int = flag(64, "images drawn at once, per process")
    save_rounds: int = flag(1, "save a checkpoint every so many rounds, and at the end")
    validation_rounds: int = flag(5, "draw held-out prompts every so many rounds; 0: at the start and the end")
    num_validation_prompts: int = flag(12, "held-out prompts that are drawn, four images of each")

    def __post_init__(self) -> None:
        """Check the settings of the rounds too."""
        super().__post_init__()
        counts = "num_rounds num_prompts_per_round sample_steps num_inner_epochs save_rounds draft_steps"
        self._require("at least 1", lambda value: value >= 1, f"{counts} rollout_batch_size num_validation_prompts")
        self._require("at least 2", lambda value: value >= 2, "num_images_per_prompt")
        self._require("above 0", lambda value: value > 0, "clip_range adv_clip")
        self._require("at least 0", lambda value: value >= 0, "kl_weight patience validation_rounds eta")
        self._require("at least 1", lambda value: value >= 1, "guidance_scale")
        self._require("in (0, 1]", lambda value: 0 < value <= 1, "train_timestep_fraction")
        if self.objective == "score_function" and self.num_inner_epochs > 1:
            raise ValueError("objective score_function is right on policy alone: num_inner_epochs must be 1")
        if self.objective in ("clipped_ratio", "score_function") and self.eta == 0:
            raise ValueError(f"eta must be above 0 for objective {self.objective}: steps have no density")
        if self.objective in ("clipped_ratio", "score_function") and self.sample_steps < 2:
            raise ValueError("sample_steps must be at least 2, got 1: the last step has no density to train on")
        if self.compile or getattr(self, "lora_dropout", 0):
            raise ValueError("compile and lora_dropout are not supported here: leave them out")
        if self.draft_steps > self.sample_steps:
            raise ValueError(f"draft_steps must be at most sample_steps ({self.sample_steps}), got {self.draft_steps}")
        if self.kl_weight and self.objective in ("matching", "draft"):
            raise ValueError(f"kl_weight is for the objectives on steps, not for {self.objective}: use heldout_reward")


@contextmanager
def base_model(unet) -> Iterator[None]:
    """Let a UNet with an adapter be what it was without, inside the block."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def matching_log_prob(model, policy: Policy, batch: dict[str, Any]) -> torch.Tensor:
    """Return minus the denoising errors of images, `(n,)`, which stand in for their log-probability."""
    text = batch["text"]
    errors = denoising_errors(
        model, policy.scheduler, batch["sample"], batch["noise"], batch["timesteps"], text.states, text.mask
    )
    return -errors * (batch["sample"][0].numel() if policy.reduction == "sum" else 1)


def round_loss(accelerator: Accelerator, config: RoundsConfig, policy: Policy, decode, reward: Reward):
    """Return the loss function for `fit`, of the objective in `config`, on batches of [`Rounds.stream`].

    Sources: Black et al. 2024 (DDPO), Clark et al. 2024 (DRaFT), Xue et al. 2025 (advantage weighted matching).
    """

    def on_steps(model, batch):
        steps = batch["sample"], batch["timesteps"], batch["text"]
        gaussian = policy.step(model, *steps)
        log_prob, advantages = gaussian.log_prob(batch["after"], policy.reduction), batch["advantages"]
        if config.objective == "score_function":
            loss, metrics = score_function_loss(log_prob, advantages, config.adv_clip), {}
        else:
            old = batch["old_log_prob"]
            loss, metrics = clipped_ratio_loss(log_prob, old, advantages, config.clip_range, config.adv_clip)
        if config.kl_weight:
            unet = accelerator.unwrap_model(model)
            with torch.no_grad(), base_model(unet):
                base = policy.step(unet, *steps)
            metrics["kl"] = gaussian.kl(base).mean()
            loss = loss + config.kl_weight * metrics["kl"]
        return loss, metrics

    def on_images(model, batch):
        log_prob = matching_log_prob(model, policy, batch)
        old = batch["old_log_prob"]
        return clipped_ratio_loss(log_prob, old, batch["advantages"], config.clip_range, config.adv_clip)

    def through_steps(model, batch):
        sample = batch["sample"]
        for timestep in policy.scheduler.timesteps[-config.draft_steps :].tolist():
            steps = torch.full((len(sample),), timestep, device=sample.device)
            sample = policy.step(model, sample, steps, batch["text"]).sample(torch.randn_like(sample))
        rewards = reward.score(decode(sample).clamp(-1, 1), batch["prompts"])
        return -rewards.mean(), {"reward": rewards.detach().mean()}

    chosen: Callable = {"matching": on_images, "draft": through_steps}.get(config.objective, on_steps)

    def loss_fn(model, batch: dict[str, Any]):
        model.eval()
        with accelerator.autocast():
            return chosen(model, batch)

    return loss_fn
