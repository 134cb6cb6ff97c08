"""What reward fine-tuning minimises, given log-probabilities and advantages; and how rewards become advantages."""

from typing import Literal

import torch


def group_advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    baseline: Literal["group", "leave-one-out"] = "group",
    normalise: bool = True,
    std_floor: float = 1e-4,
) -> torch.Tensor:
    """Return how much better each image is than the others of its prompt, `(n,)` float32.

    Args:
        rewards (`torch.Tensor` of shape `(n,)`): integers are taken as floats.
        groups (`torch.Tensor` of shape `(n,)`): number of the prompt of each image; each has at least two.
        baseline (`str`): "group" subtracts the mean of the group, of which the image itself is part, "leave-one-out"
            that of the others.
        normalise (`bool`): divide by the standard deviation of the group.
        std_floor (`float`): least such deviation. A group of equal rewards has no advantages.

    Raises:
        ValueError: if a reward is not finite, or a group has one image.

    Source: Shao et al. 2024, DeepSeekMath, section 4.1; Ahmadian et al. 2024, Back to Basics, equation 6.
    """
    rewards = rewards.double()  # so that the mean of equal rewards is no other number
    if not torch.isfinite(rewards).all():
        raise ValueError(f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rewards are not finite")
    names, members = groups.unique(return_inverse=True)
    counts = torch.bincount(members).to(rewards)
    if counts.min() < 2:
        raise ValueError("a prompt with a single image has nothing to be compared with: draw more of each")
    totals = torch.zeros(len(names)).to(rewards).index_add_(0, members, rewards)
    centred = rewards - (totals / counts)[members]
    spread = (torch.zeros_like(totals).index_add_(0, members, centred.square()) / (counts - 1)).sqrt()
    if baseline == "leave-one-out":
        centred = centred * (counts / (counts - 1))[members]
    return (centred / spread.clamp(min=std_floor)[members] if normalise else centred).float()


class PromptTracker:
    """A baseline from earlier rounds: mean and standard deviation of the last rewards of each prompt.

    Args:
        size (`int`): rewards kept for each prompt.
        least (`int`): below so many, those of the whole round stand in.

    Source: Black et al. 2024, Training Diffusion Models with Reinforcement Learning, section 6.1.
    """

    def __init__(self, size: int = 32, least: int = 16):
        self.size, self.least = size, least
        self.kept: dict[str, list[float]] = {}

    def advantages(self, prompts: list[str], rewards: torch.Tensor, std_floor: float = 1e-4) -> torch.Tensor:
        """Note the rewards `(n,)` of a round, and return their advantages `(n,)`."""
        rewards = rewards.double()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.kept[prompt] = [*self.kept.get(prompt, []), reward][-self.size :]
        found = torch.empty_like(rewards)
        for row, prompt in enumerate(prompts):
            kept = (
                torch.tensor(self.kept[prompt], dtype=torch.float64)
                if len(self.kept[prompt]) >= self.least
                else rewards
            )
            found[row] = (rewards[row] - kept.mean()) / kept.std(correction=0).clamp(min=std_floor)
        return found.float()

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"kept": self.kept}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.kept = dict(state["kept"])


def clipped_ratio_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float, adv_clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the clipped surrogate of PPO, and what tells whether it is healthy.

    Args:
        log_prob, old_log_prob, advantages (`torch.Tensor` of shape `(n,)`): under the policy now, and when sampled.
        clip_range (`float`): the ratio counts between 1 - `clip_range` and 1 + `clip_range`; on the scale of the
            log-probabilities (sum or mean over the values of a sample).
        adv_clip (`float`): advantages are cut to this size.

    Returns:
        The loss, a scalar, and `ratio` (mean, 1 at the start), `clip_fraction` and `approx_kl`.

    Source: Black et al. 2024, Training Diffusion Models with Reinforcement Learning (DDPO-IS), equation 4 with PPO's
    clipping.
    """
    advantages = advantages.clamp(-adv_clip, adv_clip)
    ratio = torch.exp(log_prob - old_log_prob)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    with torch.no_grad():
        metrics = {
            "ratio": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
            "approx_kl": (log_prob - old_log_prob).square().mean() / 2,
        }
    return loss, metrics


def score_function_loss(log_prob: torch.Tensor, advantages: torch.Tensor, adv_clip: float) -> torch.Tensor:
    """Return the loss whose gradient is the policy gradient, for samples of the policy as it is now, a scalar.

    Source: Black et al. 2024, Training Diffusion Models with Reinforcement Learning (DDPO-SF), equation 3.
    """
    return -(advantages.clamp(-adv_clip, adv_clip) * log_prob).mean()


def preference_loss(
    winner_errors: torch.Tensor,
    loser_errors: torch.Tensor,
    base_winner_errors: torch.Tensor,
    base_loser_errors: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return the Diffusion-DPO loss of pairs, of which each is denoised at one timestep, a scalar.

    Args:
        winner_errors, loser_errors, base_winner_errors, base_loser_errors (`torch.Tensor` of shape `(n,)`): mean
            squared errors of the model and of its base; both of a pair meet the same noise at the same timestep.
        beta (`float`): how strongly the base holds back, times the number of timesteps and the weight of each.

    Source: Wallace et al. 2024, Diffusion Model Alignment Using Direct Preference Optimization, equation 14.
    """
    better = (winner_errors - base_winner_errors) - (loser_errors - base_loser_errors)
    return -torch.nn.functional.logsigmoid(-beta * better).mean()
