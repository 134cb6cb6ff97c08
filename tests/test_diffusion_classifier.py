"""The caption with which a generator denoises an image best."""

import torch
from diffusers import DDPMScheduler

from visbio_diffusers.alignment.diffusion_classifier import denoising_evidence


def test_evidence_is_the_mean_difference_of_losses_on_the_same_noise(tiny_pipeline):
    captions = ["a cell", "two cells", "no cell at all"]
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    found = denoising_evidence(tiny_pipeline, images, captions, num_samples=5, seed=3)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(2), rtol=0, atol=1e-5)

    scheduler = DDPMScheduler.from_config(tiny_pipeline.scheduler.config)
    noises = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    losses = torch.zeros(3)
    for noise, step in zip(noises, (100, 275, 450, 625, 800)):
        for k, caption in enumerate(captions):
            states, _ = tiny_pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
            timestep = torch.tensor([step])
            noised = scheduler.add_noise(images[:1], noise[None], timestep)
            with torch.no_grad():
                velocity = tiny_pipeline.unet(noised, timestep, states).sample
            losses[k] += (velocity - scheduler.get_velocity(images[:1], noise[None], timestep)).square().mean() / 5
    torch.testing.assert_close(found[0], losses - losses.mean(), rtol=1e-3, atol=1e-5)


def test_batches_make_no_difference(tiny_pipeline):
    captions, images = ["a cell", "two cells"], torch.rand(1, 3, 8, 8) * 2 - 1
    whole = denoising_evidence(tiny_pipeline, images, captions, num_samples=7)
    torch.testing.assert_close(denoising_evidence(tiny_pipeline, images, captions, num_samples=7, batch_size=1), whole)
