"""Steps as Gaussians, against Diffusers' own steps and torch's own densities."""

import pytest
import torch
from diffusers import DDIMScheduler

from visbio_diffusers.policy import Gaussian, reverse_step, stochastic_timesteps


def make(prediction_type="v_prediction", zero_snr=True, final=True, steps=20):
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading", clip_sample=False, set_alpha_to_one=final,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1 - 1e-6])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr", "final"),
    [("v_prediction", True, True), ("v_prediction", False, False), ("epsilon", False, True), ("sample", True, True)],
)
def test_mean_and_std_are_those_of_the_scheduler(prediction_type, zero_snr, final, eta):
    scheduler = make(prediction_type, zero_snr, final)
    generator = torch.Generator().manual_seed(0)
    outputs, samples, noises = (torch.randn(20, 3, 4, 4, generator=generator) for _ in range(3))
    found = reverse_step(scheduler, outputs, scheduler.timesteps, samples, eta)
    for row, timestep in enumerate(scheduler.timesteps):
        one = slice(row, row + 1)
        arguments = {"eta": eta, "variance_noise": noises[one]} if eta else {}
        expected = scheduler.step(outputs[one], timestep, samples[one], **arguments).prev_sample
        own = Gaussian(found.mean[one], found.std[one]).sample(noises[one])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_densities_are_those_of_torch_and_the_reduction_scales_them():
    mean, std = torch.randn(4, 3, 5, 5), torch.rand(4, 1, 1, 1) + 0.1
    gaussian, sample = Gaussian(mean, std), torch.randn(4, 3, 5, 5)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(sample).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.log_prob(sample, "sum"), expected)
    torch.testing.assert_close(gaussian.log_prob(sample, "mean"), expected / 75)
    other = Gaussian(mean + 0.1, std)
    normal = [torch.distributions.Normal(each.mean, each.std.expand_as(mean)) for each in (gaussian, other)]
    exact = torch.distributions.kl_divergence(*normal).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.kl(other), exact)


def test_ratio_on_policy_is_exactly_one():
    scheduler = make()
    outputs, samples = torch.randn(19, 3, 4, 4), torch.randn(19, 3, 4, 4)
    steps = stochastic_timesteps(scheduler)
    drawn = reverse_step(scheduler, outputs, steps, samples).sample(torch.randn(19, 3, 4, 4))
    log_probs = [reverse_step(scheduler, outputs, steps, samples).log_prob(drawn, "sum") for _ in range(2)]
    assert torch.equal(torch.exp(log_probs[1] - log_probs[0]), torch.ones(19))


def test_only_steps_with_noise_have_a_density():
    assert torch.equal(stochastic_timesteps(make()), make().timesteps[:-1])  # the last ends in the clean image
    assert len(stochastic_timesteps(make(final=False, zero_snr=False))) == 19  # whose variance is 0 there too
    assert torch.equal(stochastic_timesteps(make(steps=15)), make(steps=15).timesteps[:-1])  # whose last has a little
    assert len(stochastic_timesteps(make(), eta=0.0)) == 0


def test_clipping_schedulers_are_refused():
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="cuts gradients off"):
        reverse_step(scheduler, torch.zeros(1, 3, 2, 2), scheduler.timesteps[:1], torch.zeros(1, 3, 2, 2))


def test_no_gradient_is_lost_at_the_first_step_of_zero_snr():
    scheduler = make()
    output = torch.randn(1, 3, 4, 4, requires_grad=True)
    step = reverse_step(scheduler, output, scheduler.timesteps[:1], torch.randn(1, 3, 4, 4))
    step.log_prob(torch.randn(1, 3, 4, 4), "sum").sum().backward()
    assert torch.isfinite(output.grad).all() and output.grad.abs().min() > 0
