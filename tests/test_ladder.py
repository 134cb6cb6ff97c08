"""The ladder: the pipeline's own sampling, begun from an image under noise."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from visbio_diffusers.explanation.ladder import denoising_ladder, ladder_sheet
from visbio_diffusers.load import load_pipeline


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
CALL = {"num_inference_steps": 5, "guidance_scale": 2.0}


def test_the_highest_rung_is_a_drawing_from_its_noise(tiny_pipeline):
    *_, top = denoising_ladder(tiny_pipeline, IMAGE, "a cell", seed=3, **CALL)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = tiny_pipeline("a cell", latents=noise, **CALL).images[0]
    assert top.timestep == 999 and top.signal < 1e-6
    np.testing.assert_allclose(np.asarray(top.reconstruction, int), np.asarray(drawn, int), atol=1)
    np.testing.assert_allclose(
        np.asarray(top.noised, int), (noise[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255, atol=1
    )


def test_rungs_are_the_nearest_steps_and_the_last_step_is_the_first_guess(tiny_pipeline):
    rungs = denoising_ladder(tiny_pipeline, IMAGE, "a cell", (0.05, 0.45, 0.75), **CALL)
    assert [rung.timestep for rung in rungs] == [199, 399, 799]
    assert np.array_equal(np.asarray(rungs[0].one_step), np.asarray(rungs[0].reconstruction))
    assert not np.array_equal(np.asarray(rungs[1].one_step), np.asarray(rungs[1].reconstruction))
    sheet = ladder_sheet(IMAGE, rungs, tile=40)
    assert sheet.width == 3 * 48


def test_the_shipped_model_keeps_what_little_noise_leaves(visbio_data):
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        image = Image.fromarray(real["test_images"][0])
    pipe, _ = load_pipeline(device="cpu")
    rungs = denoising_ladder(pipe, image, "a blood cell", (0.2, 1.0), num_inference_steps=5, guidance_scale=1.0)
    for name in ("one_step", "reconstruction"):
        low, high = (np.abs(np.asarray(getattr(r, name), float) - np.asarray(image)).mean() for r in rungs)
        assert low < high / 2


def test_mistakes_are_named(tiny_pipeline, tiny_stable_diffusion_dir):
    with pytest.raises(ValueError, match=r"above 0 and at most 1, but are \(0.5, 1.5\)"):
        denoising_ladder(tiny_pipeline, IMAGE, "a cell", (0.5, 1.5))
    with pytest.raises(ValueError, match="multiples of 2"):
        denoising_ladder(tiny_pipeline, IMAGE.resize((7, 7)), "a cell")
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not denoise pixels"):
        denoising_ladder(StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir), IMAGE, "a cell")
