"""Advantages by hand; gradients against closed forms; a policy that finds the known optimum of a reward."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from visbio_diffusers.objectives import (
    PromptTracker,
    clipped_ratio_loss,
    group_advantages,
    preference_loss,
    score_function_loss,
)
from visbio_diffusers.policy import reverse_step, stochastic_timesteps


def test_advantages_by_hand():
    rewards, groups = torch.tensor([1, 3, 5, 2, 2]), torch.tensor([7, 7, 7, 4, 4])  # integers are no reason to round
    plain = group_advantages(rewards, groups, normalise=False)
    assert plain.tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0]
    assert group_advantages(rewards, groups).tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0, 0.0])
    left = group_advantages(rewards, groups, "leave-one-out", normalise=False)
    assert left.tolist() == [1 - 4.0, 3 - 3.0, 5 - 2.0, 0.0, 0.0]
    tiny = group_advantages(torch.tensor([0.5, 0.5 + 1e-7]), torch.zeros(2), std_floor=1e-2)
    assert tiny.abs().max() < 1e-4
    with pytest.raises(ValueError, match="1 of 2 rewards are not finite"):
        group_advantages(torch.tensor([1.0, math.nan]), torch.zeros(2))
    with pytest.raises(ValueError, match="a prompt with a single image"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_equal_rewards_have_no_advantages_whatever_their_size():
    for value in (1000.1, 150000.3, 1234.567):
        found = group_advantages(torch.full((24,), value), torch.arange(24) // 12)
        assert found.abs().max() == 0 and found.dtype == torch.float32


def test_tracker_remembers_rounds():
    tracker = PromptTracker(size=3, least=2)
    first = tracker.advantages(["a", "b"], torch.tensor([0.0, 2.0]))
    assert first.tolist() == pytest.approx([-1.0, 1.0])  # against the round
    assert tracker.advantages(["a"], torch.tensor([4.0])).tolist() == pytest.approx([1.0])  # of 0 and 4
    tracker.advantages(["a", "a"], torch.tensor([6.0, 8.0]))
    assert tracker.kept["a"] == [4.0, 6.0, 8.0]
    other = PromptTracker(size=3, least=2)
    other.load_state_dict(tracker.state_dict())
    assert other.kept == tracker.kept


def test_gradient_on_policy_is_the_policy_gradient():
    log_prob, advantages = torch.randn(6, requires_grad=True), torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0])
    loss, metrics = clipped_ratio_loss(log_prob, log_prob.detach(), advantages, clip_range=0.1, adv_clip=5.0)
    expected = -advantages.clamp(-5, 5) / 6
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], expected)
    gradient = torch.autograd.grad(score_function_loss(log_prob, advantages, 5.0), log_prob)[0]
    torch.testing.assert_close(gradient, expected)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0 == metrics["approx_kl"]


def test_clipping_by_hand():
    old, shift = torch.zeros(4), torch.tensor([0.5, 0.5, -0.5, -0.5])
    log_prob, advantages = shift.clone().requires_grad_(), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = clipped_ratio_loss(log_prob, old, advantages, clip_range=0.2, adv_clip=10.0)
    terms = [-1.2, math.exp(0.5), -math.exp(-0.5), 0.8]
    assert loss.item() == pytest.approx(sum(terms) / 4)
    gradient = torch.autograd.grad(loss, log_prob)[0]
    assert (gradient == 0).tolist() == [True, False, False, True]  # moved far enough in the wanted direction
    assert metrics["clip_fraction"] == 1 and metrics["approx_kl"].item() == pytest.approx(0.125)


def test_preference_loss_starts_at_log_two_and_falls_for_the_winner():
    errors = torch.rand(5)
    assert preference_loss(errors, errors + 1, errors, errors + 1, 100.0).item() == pytest.approx(math.log(2))
    better = preference_loss(errors - 0.01, errors, errors, errors, 100.0)
    assert better.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-4)


class Linear(torch.nn.Module):
    """A denoiser of one dimension whose clean image is one learned number, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample):
        return self.centre.expand_as(sample)


@pytest.mark.parametrize("objective", ["clipped ratio", "score function", "shuffled"])
def test_a_policy_finds_the_optimum_of_a_quadratic_reward(objective):
    """Samples end at the learned centre; the reward -(x - 0.7)^2 is highest there, so that the optimum is 0.7."""
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(5)
    torch.manual_seed(0)
    model = Linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    training_steps = set(stochastic_timesteps(scheduler).tolist())
    for _ in range(60):
        sample, path = torch.randn(256, 1, 1, 1), []
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                steps = timestep.repeat(256)
                step = reverse_step(scheduler, model(sample), steps, sample)
                following = step.sample(torch.randn_like(sample))
                if int(timestep) in training_steps:
                    path.append((steps, sample, following, step.log_prob(following, "sum")))
                sample = following
        # The last step is certain; what the noise before it led to is what can be rewarded.
        rewards = -(path[-1][2].flatten() - 0.7).square()
        advantages = group_advantages(rewards, torch.zeros(256))
        if objective == "shuffled":
            advantages = advantages[torch.randperm(256)]
        for steps, seen, following, old in path:
            log_prob = reverse_step(scheduler, model(seen), steps, seen).log_prob(following, "sum")
            if objective == "score function":
                loss = score_function_loss(log_prob, advantages, 5.0)
            else:
                loss, _ = clipped_ratio_loss(log_prob, old, advantages, 0.2, 5.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    previous = scheduler.alphas_cumprod[path[-1][0][0] - 200]
    found = model.centre.item() * previous.sqrt().item()
    assert (abs(found - 0.7) < 0.1) is (objective != "shuffled"), found
