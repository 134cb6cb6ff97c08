"""Rollouts: they are Diffusers' own sampling, and on policy the ratio is 1."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from visbio_diffusers.rollouts import collect, decoder, encode_prompts, make_policy


PROMPTS = ["a monocyte", "a platelet in a smear", "a cell"]


def policy_of(pipe, guidance_scale=1.0, eta=1.0, reduction="sum"):
    return make_policy(pipe.scheduler, 5, guidance_scale, eta, reduction)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_without_noise_they_are_the_pipelines_own_images(tiny_pipeline, guidance_scale):
    text = encode_prompts(tiny_pipeline, PROMPTS)
    rollout = collect(
        tiny_pipeline.unet, policy_of(tiny_pipeline, guidance_scale, 0.0), text, torch.Generator().manual_seed(7)
    )
    first = torch.randn(6, 3, 3, 8, 8, generator=torch.Generator().manual_seed(7))[0]
    tiny_pipeline.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    expected = tiny_pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=guidance_scale, latents=first, output_type="latent"
    ).images
    torch.testing.assert_close(rollout.samples, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_ratio_is_one_on_policy(tiny_pipeline, guidance_scale):
    policy, text = policy_of(tiny_pipeline, guidance_scale), encode_prompts(tiny_pipeline, PROMPTS)
    kept = policy.stochastic.tolist()
    assert len(kept) == 4  # the last step draws no noise
    rollout = collect(tiny_pipeline.unet, policy, text, torch.Generator().manual_seed(0), kept)
    assert rollout.before.shape == rollout.after.shape == (4, 3, 3, 8, 8)
    torch.testing.assert_close(rollout.before[1:], rollout.after[:-1])
    for step, timestep in enumerate(kept):
        steps = torch.full((3,), timestep)
        again = policy.step(tiny_pipeline.unet, rollout.before[step], steps, text)
        ratio = torch.exp(again.log_prob(rollout.after[step], "mean") - rollout.log_probs[step] / 192)
        torch.testing.assert_close(ratio, torch.ones(3), rtol=0, atol=1e-6)


def test_batches_do_not_matter_and_a_seed_is_all(tiny_pipeline):
    policy, text = policy_of(tiny_pipeline), encode_prompts(tiny_pipeline, PROMPTS)
    whole, parts = (
        collect(
            tiny_pipeline.unet, policy, text, torch.Generator().manual_seed(3), policy.stochastic.tolist()[:2], 0, size
        )
        for size in (3, 2)
    )
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_empty_text_takes_no_gradient_unless_asked(tiny_pipeline):
    text = encode_prompts(tiny_pipeline, PROMPTS)
    grads = {}
    for whole in (False, True):
        tiny_pipeline.unet.zero_grad()
        policy = policy_of(tiny_pipeline, 2.5)._replace(train_empty=whole)
        sample = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        policy.step(tiny_pipeline.unet, sample, torch.full((3,), 799), text).mean.sum().backward()
        grads[whole] = tiny_pipeline.unet.conv_out.bias.grad.clone()
    torch.testing.assert_close(grads[False], 2.5 * grads[True], rtol=1e-4, atol=1e-6)


def test_stable_diffusion_is_drawn_and_decoded_alike(tiny_stable_diffusion_dir):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir)
    pipe.set_progress_bar_config(disable=True)
    text = encode_prompts(pipe, PROMPTS)
    rollout = collect(pipe.unet, policy_of(pipe, 3.0, 0.0), text, torch.Generator().manual_seed(7))
    images = decoder(pipe)(rollout.samples).clamp(-1, 1)
    first = torch.randn(6, 3, 4, 8, 8, generator=torch.Generator().manual_seed(7))[0]
    expected = pipe(PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=first, output_type="pt").images
    torch.testing.assert_close((images + 1) / 2, expected, rtol=1e-4, atol=1e-4)
