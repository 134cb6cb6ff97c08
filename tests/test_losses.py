"""Losses by hand, and equal to what the schedulers compute."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from visbio_diffusers.losses import diffusion_loss, snr_weights, stratified_timesteps


def test_timesteps_hold_one_of_each_part_and_are_uniform():
    torch.manual_seed(0)
    drawn = torch.stack([stratified_timesteps(8, 1000) for _ in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 999 and drawn.dtype == torch.int64
    assert torch.equal(drawn.sort(dim=1).values // 125, torch.arange(8).expand(4000, 8))
    # Each place of the batch alone is uniform: 400 draws in every tenth of the schedule, give or take 5 deviations.
    for place in (0, 7):
        counts = torch.bincount(drawn[:, place] // 100, minlength=10)
        assert (counts - 400).abs().max() < 5 * (4000 * 0.1 * 0.9) ** 0.5
    # So is the whole: each timestep 32 times on average, 0 and 999 among them.
    counts = torch.bincount(drawn.flatten(), minlength=1000)
    assert (counts - 32).abs().max() < 5.5 * 32**0.5


@pytest.mark.parametrize(("batch_size", "num_train_timesteps"), [(1, 1000), (7, 1000), (64, 10), (3, 1)])
def test_timesteps_of_any_batch_lie_in_the_schedule(batch_size, num_train_timesteps):
    torch.manual_seed(0)
    for _ in range(50):
        drawn = stratified_timesteps(batch_size, num_train_timesteps)
        assert drawn.shape == (batch_size,) and 0 <= drawn.min() and drawn.max() < num_train_timesteps


def test_snr_weights_by_hand():
    """min(SNR, 5) / (SNR + 1), SNR = a / (1 - a): 99 -> 5/100, 4 -> 4/5, 1 -> 1/2, 0.25 -> 0.2, 0 -> 0."""
    alphas_cumprod = torch.tensor([0.99, 0.8, 0.5, 0.2, 0.0])
    expected = torch.tensor([0.05, 0.8, 0.5, 0.2, 0.0])
    torch.testing.assert_close(snr_weights(alphas_cumprod, 5.0, floor=0.0), expected)
    torch.testing.assert_close(snr_weights(alphas_cumprod, 5.0), expected.clamp(min=0.1))
    torch.testing.assert_close(snr_weights(alphas_cumprod, 1.0, floor=0.0)[1], torch.tensor(0.2))  # 1 / (4 + 1)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    torch.testing.assert_close(snr_weights(alphas_cumprod, 5.0, "sample", floor=0.0), snr.clamp(max=5))
    noise = snr_weights(alphas_cumprod[:-1], 5.0, "epsilon", floor=0.0)
    torch.testing.assert_close(noise, (5 / snr[:-1]).clamp(max=1))
    assert snr_weights(alphas_cumprod, 0).tolist() == [1.0] * 5


def test_snr_weights_leave_no_timestep_of_the_default_schedule_untrained():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    assert snr_weights(scheduler.alphas_cumprod, 5.0, floor=0.0)[-1] == 0
    weights = snr_weights(scheduler.alphas_cumprod, 5.0)
    assert weights.isfinite().all() and weights.min() == pytest.approx(0.1)


class _Recorder(torch.nn.Module):
    """Predicts 0, and keeps what it was given."""

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask, return_dict):
        self.given = sample, timestep, encoder_hidden_states, encoder_attention_mask
        return (torch.zeros_like(sample),)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_and_noised_image_are_the_schedulers(prediction_type, weighted):
    """With a prediction of 0 the loss is the weighted mean square of the target."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    pixel_values = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text, mask = torch.ones(6, 2, 5), torch.ones(6, 2)
    weights = torch.linspace(0.5, 3, 1000) if weighted else None
    model = _Recorder()
    torch.manual_seed(3)
    loss = diffusion_loss(model, scheduler, pixel_values, text, mask, weights)

    torch.manual_seed(3)
    noise = torch.randn_like(pixel_values)
    timesteps = stratified_timesteps(6, 1000)
    sample, timestep, *conditions = model.given
    assert torch.equal(timestep, timesteps)
    assert torch.equal(sample, scheduler.add_noise(pixel_values, noise, timesteps))
    assert conditions[0] is text and conditions[1] is mask
    velocity = scheduler.get_velocity(pixel_values, noise, timesteps)
    target = {"v_prediction": velocity, "epsilon": noise, "sample": pixel_values}[prediction_type]
    each = target.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (each * weights[timesteps]).mean() if weighted else each.mean())


def test_velocity_by_hand():
    """Where a = 0.64, image 0.5 and noise -1 mix to 0.8 * 0.5 - 0.6 = -0.2; v = 0.8 * -1 - 0.6 * 0.5 = -1.1."""
    scheduler = DDPMScheduler(num_train_timesteps=1, trained_betas=[0.36], prediction_type="v_prediction")
    image, noise, timestep = torch.tensor([[[[0.5]]]]), torch.tensor([[[[-1.0]]]]), torch.tensor([0])
    torch.testing.assert_close(scheduler.add_noise(image, noise, timestep).item(), -0.2)
    torch.testing.assert_close(scheduler.get_velocity(image, noise, timestep).item(), -1.1)


def test_the_best_predictor_of_a_constant_has_no_loss(tiny_unet):
    """All images are one, so the velocity follows from sample and timestep; any other prediction costs."""
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pixel_values = torch.full((64, 3, 8, 8), 0.3)

    def best(sample, timesteps, return_dict, **text):
        alpha = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        noise = (sample - alpha.sqrt() * 0.3) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * 0.3,)

    torch.manual_seed(0)
    assert diffusion_loss(best, scheduler, pixel_values, None, None) < 1e-6
    text, mask = torch.ones(64, 2, 24), torch.ones(64, 2)
    assert diffusion_loss(tiny_unet(), scheduler, pixel_values, text, mask) > 0.1
