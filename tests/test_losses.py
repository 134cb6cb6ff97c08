"""Losses by hand, and equal to what the schedulers compute."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from transformers import CLIPConfig, CLIPModel

from visbio_diffusers.losses import (
    contrastive_loss,
    diffusion_loss,
    sigmoid_contrastive_loss,
    snr_weights,
    stratified_timesteps,
)


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


def embeds(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1).requires_grad_()


def test_contrastive_loss_is_that_of_clip():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "eos_token_id": 49}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tokens, pixel_values = torch.randint(0, 49, (6, 5)), torch.randn(6, 3, 8, 8)
    out = clip(input_ids=tokens, pixel_values=pixel_values, return_loss=True)
    own = contrastive_loss(out.image_embeds, out.text_embeds, clip.logit_scale.exp())
    torch.testing.assert_close(own, out.loss)
    parameters = clip.logit_scale, clip.visual_projection.weight, clip.text_projection.weight
    expected = torch.autograd.grad(out.loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(own, parameters), expected, rtol=1e-4, atol=1e-6)


def test_other_matching_pairs_are_no_negatives_by_hand():
    images, texts = embeds(3, 0), embeds(3, 1)
    matching = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    logits = 5 * images @ texts.T
    pairs = {0: (0, 1), 1: (0, 1), 2: (2,)}

    def one_way(table):
        rows = []
        for i, fitting in pairs.items():
            others = [table[i, j].exp() for j in range(3) if j not in fitting]
            terms = [-torch.log(table[i, j].exp() / (table[i, j].exp() + sum(others))) for j in fitting]
            rows.append(sum(terms) / len(fitting))
        return sum(rows) / 3

    expected = (one_way(logits) + one_way(logits.T)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, 5.0, matching), expected)


def test_texts_of_other_things_are_wrong_answers_for_every_image():
    images, texts, others = embeds(3, 0), embeds(3, 1), embeds(2, 2)
    logits = 5 * images @ torch.cat([texts, others]).T
    rows = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    columns = torch.nn.functional.cross_entropy(logits[:, :3].T, torch.arange(3))
    found = contrastive_loss(images, torch.cat([texts, others]), 5.0, torch.eye(3, 5, dtype=torch.bool))
    torch.testing.assert_close(found, (rows + columns) / 2)


def test_a_batch_of_one_class_gives_no_loss_and_no_gradient():
    images, texts = embeds(4, 0), embeds(4, 1)
    loss = contrastive_loss(images, texts, 100.0, torch.ones(4, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and images.grad.abs().max() == 0 == texts.grad.abs().max()


def test_sigmoid_loss_by_hand_and_with_matching_pairs():
    images, texts = embeds(3, 0), embeds(3, 1)
    matching = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    for fits in (torch.eye(3, dtype=torch.bool), matching):
        logits = 4 * images @ texts.T - 2
        terms = [
            torch.log(1 + torch.exp((-1 if fits[i, j] else 1) * logits[i, j])) for i in range(3) for j in range(3)
        ]
        torch.testing.assert_close(sigmoid_contrastive_loss(images, texts, 4.0, -2.0, fits), sum(terms) / 3)
    default = sigmoid_contrastive_loss(images, texts, 4.0, -2.0)
    alone = torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(default, sigmoid_contrastive_loss(images, texts, 4.0, -2.0, alone))
