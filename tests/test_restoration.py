"""Images restored: samples against the posterior of Gaussian data in closed form, exact means, and what is refused."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from visbio_diffusers import VisBioPipeline, VisBioRestorationPipeline, VisBioUNet, default_model


# Data: squares of 2 x 2 pixels that have a part in common, so that mean and rest of a square are independent; as the
# eigenvalues of their covariance.
MEAN, COMMON, OWN = 0.1, 0.3, 0.2
COVARIANCE = COMMON**2 * np.ones((4, 4)) + OWN**2 * np.eye(4)
OF_MEAN, OF_REST = 4 * COMMON**2 + OWN**2, OWN**2
SCHEDULES = {
    "zero terminal SNR": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {},
}


def _seed(number=0):
    return torch.Generator().manual_seed(number)


def _squares(images):
    """Return (..., 4) of (..., height, width): the pixels of each square."""
    return images.unfold(-2, 2, 2).unfold(-2, 2, 2).flatten(-2)


class GaussianUNet(VisBioUNet):
    """The best denoiser of the Gaussian data."""

    def forward(self, sample, timestep, *args, **kwargs):
        alpha = self.alphas[timestep]
        centred = sample - alpha.sqrt() * MEAN
        means = torch.nn.functional.avg_pool2d(centred, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        gains = [alpha.sqrt() * value / (alpha * value + 1 - alpha) for value in (OF_MEAN, OF_REST)]
        clean = MEAN + gains[0] * means + gains[1] * (centred - means)
        noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return ({"sample": clean, "epsilon": noise, "v_prediction": velocity}[self.kind],)


@pytest.fixture
def gaussian(tiny_pipeline):
    """Return a function that makes a pipeline of the best denoiser."""

    def make(scheduler, kind, **schedule):
        unet = GaussianUNet.from_config(tiny_pipeline.unet.config)
        scheduler = getattr(diffusers, scheduler)(prediction_type=kind, timestep_spacing="trailing", **schedule)
        unet.kind, unet.alphas = kind, scheduler.alphas_cumprod.clamp(min=2**-24)
        pipe = VisBioRestorationPipeline(**{**tiny_pipeline.components, "unet": unet, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def restore(tiny_pipeline):
    pipe = VisBioRestorationPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pixels(size=8, seed=3):
    return 0.3 + 0.4 * torch.rand(3, size, size, generator=_seed(seed))


def _posterior(given, factor, noise_std):
    """Return mean (3, 4, 4, 4) and covariance (4, 4) of squares, in the model's range, given an image in [0, 1]."""
    matrix = np.full((1, 4), 0.25) if factor == 2 else np.eye(4)
    noise = (2 * noise_std) ** 2 * np.eye(len(matrix))
    gain = COVARIANCE @ matrix.T @ np.linalg.inv(matrix @ COVARIANCE @ matrix.T + noise)
    measured = (2 * given - 1).numpy()[..., None] if factor == 2 else _squares(2 * given - 1).numpy()
    return MEAN + (measured - matrix.sum(axis=1) * MEAN) @ gain.T, COVARIANCE - gain @ matrix @ COVARIANCE


@pytest.mark.parametrize(("factor", "noise_std"), [(1, 0.1), (1, 0.4), (2, 0.0), (2, 0.05), (2, 0.2)])
def test_samples_are_those_of_the_posterior(gaussian, factor, noise_std):
    pipe, count = gaussian("DDIMScheduler", "v_prediction", **SCHEDULES["zero terminal SNR"]), 400
    given = _pixels(8 // factor)
    drawn = _draw(pipe, given, factor, noise_std, num_images_per_prompt=count, num_inference_steps=150)
    squares = _squares(drawn).double().numpy()
    mean, covariance = _posterior(given, factor, noise_std)
    error = (squares.mean(axis=0) - mean) / (covariance.diagonal() / count) ** 0.5
    assert np.abs(error).max() < 5 and (error**2).mean() == pytest.approx(1, abs=0.35)  # of 192 pixels
    spread = np.cov((squares - squares.mean(axis=0)).reshape(-1, 4).T) * count / (count - 1)
    np.testing.assert_allclose(spread, covariance, atol=0.06 * covariance.max())


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("v_prediction", "zero terminal SNR"),
        ("sample", "zero terminal SNR"),
        ("epsilon", "cosine"),
        ("epsilon", "linear"),
    ],
)
def test_every_prediction_and_schedule(gaussian, name, kind, schedule):
    pipe = gaussian(name, kind, **SCHEDULES[schedule])
    for factor, noise_std in ((1, 0.1), (2, 0.0)):
        given = _pixels(8 // factor)
        drawn = _draw(pipe, given, factor, noise_std, num_images_per_prompt=100, num_inference_steps=100)
        mean, covariance = _posterior(given, factor, noise_std)
        found = _squares(drawn).numpy() - mean
        assert np.abs(found.mean(axis=0)).max() < 5.5 * (covariance[0, 0] / 100) ** 0.5
        assert found.var() == pytest.approx(covariance[0, 0], rel=0.1)


def test_one_step_gives_the_mean_of_the_posterior(gaussian):
    pipe, given = gaussian("EulerDiscreteScheduler", "epsilon", **SCHEDULES["linear"]), _pixels()
    drawn = _draw(pipe, given, noise_std=0.1, num_inference_steps=1)[0]
    mean, covariance = _posterior(given, 1, 0.1)
    error = (_squares(drawn).numpy() - mean) / covariance[0, 0] ** 0.5
    assert (error**2).mean() ** 0.5 < 0.2  # of noise up to the next timestep; a sample has 1


def _draw(pipe, image, factor=1, noise_std=0.0, seed=0, **kwargs):
    settings = {"num_inference_steps": 5, "output_type": "latent", "generator": _seed(seed), **kwargs}
    return pipe(image=image, factor=factor, noise_std=noise_std, **settings).images


def test_real_images_are_enlarged_to_pixels_whose_means_they_are(visbio_data):
    pipe = VisBioRestorationPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        originals = torch.from_numpy(real["test_images"][:4]).permute(0, 3, 1, 2) / 255
    given = torch.nn.functional.avg_pool2d(originals, 2)
    for factor, small in ((2, given), (4, torch.nn.functional.avg_pool2d(given, 2))):
        drawn = _draw(pipe, small, factor, num_inference_steps=4, output_type="pt")
        assert drawn.min() >= 0 and drawn.max() <= 1
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(drawn, factor), small, atol=1e-5, rtol=0)
        shown = np.stack(_draw(pipe, small, factor, num_inference_steps=4, output_type="pil")) / 255
        shown = torch.nn.functional.avg_pool2d(torch.from_numpy(shown).permute(0, 3, 1, 2), factor)
        assert (shown - small).abs().max() <= 0.5001 / 255
    noisy = (originals + 0.1 * torch.randn(originals.shape, generator=_seed())).clamp(0, 1)
    cleaned = _draw(pipe, noisy, noise_std=0.1, num_inference_steps=2, output_type="pt")
    assert (cleaned - originals).square().mean() < 0.25 * (noisy - originals).square().mean()


def test_white_and_black_squares_are_kept(restore):
    """There the model's pixels are cut off, and the given ones still met."""
    given = (torch.rand(3, 4, 4, generator=_seed()) > 0.5).float()
    drawn = _draw(restore, given, 2, output_type="pt")[0]
    assert torch.allclose(drawn, given.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)


def test_an_image_is_the_same_alone_and_in_a_batch(restore):
    images, prompts = [_pixels(4, 1), _pixels(4, 2)], ["a cell", "dust"]
    settings = {"factor": 2, "noise_std": 0.01, "guidance_scale": 2.0}
    together = _draw(
        restore, images, prompt=prompts, num_images_per_prompt=2, generator=list(map(_seed, range(4))), **settings
    )
    for k in range(4):
        alone = _draw(restore, images[k // 2], prompt=prompts[k // 2], seed=k, **settings)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.05  # of one image, from two seeds


def test_without_text_is_the_empty_text(restore):
    images = torch.stack([_pixels(4, 1), _pixels(4, 2)])
    drawn = _draw(restore, images, 2, guidance_scale=3.0)
    empty = restore.encode_prompt("", do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(drawn, _draw(restore, images, 2, prompt_embeds=empty.expand(2, -1, -1)))
    assert (drawn - _draw(restore, images, 2, prompt=["a cell", "a cell"])).abs().max() > 1e-3


def test_the_same_image_in_every_form_and_out(restore):
    array = np.array(Image.fromarray((_pixels().permute(1, 2, 0).numpy() * 255).astype(np.uint8)))
    drawn = _draw(restore, Image.fromarray(array), noise_std=0.2)
    for given in (array, array / np.float32(255), torch.from_numpy(array).permute(2, 0, 1), [array]):
        assert torch.equal(_draw(restore, given, noise_std=0.2), drawn)
    shown = _draw(restore, array, noise_std=0.2, output_type="np")
    np.testing.assert_allclose(shown, (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)
    as_tuple = restore(image=array, noise_std=0.2, num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0][0].size == (8, 8)
    assert _draw(restore, array, 2, height=16, width=16).shape == (1, 3, 16, 16)


def test_steps_begin_at_the_noise_of_the_image(restore):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(int(timestep))
        return tensors

    _draw(restore, _pixels(), noise_std=0.1, callback_on_step_end=callback)
    alpha = restore.scheduler.alphas_cumprod[seen[0]]
    assert ((1 - alpha) / alpha).sqrt().item() == pytest.approx(0.2, abs=0.002)  # the model's range is twice as wide
    level = seen[0]
    assert len(seen) == 5 and np.ptp(np.diff(seen)) <= 1 and seen == sorted(seen, reverse=True)
    seen.clear()
    _draw(restore, _pixels(), noise_std=0.001, callback_on_step_end=callback)
    assert 1 <= len(seen) < 5
    seen.clear()
    _draw(restore, _pixels(4), 2, noise_std=0.05, callback_on_step_end=callback)  # of a mean of 4
    assert seen == sorted({999, 799, 599, 399, 199, level}, reverse=True)


def test_parts_are_shared_saved_and_loaded(tiny_pipeline, tiny_pipeline_dir, tmp_path):
    pipe = VisBioRestorationPipeline.from_pipe(tiny_pipeline)
    assert all(pipe.components[name] is part for name, part in tiny_pipeline.components.items())
    assert type(VisBioPipeline.from_pipe(pipe)) is VisBioPipeline
    drawn = _draw(pipe, _pixels(), noise_std=0.1)
    assert type(tiny_pipeline.scheduler).__name__ == "DDIMScheduler"  # of the other pipeline, which keeps it
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded) is VisBioRestorationPipeline
    assert torch.equal(_draw(loaded, _pixels(), noise_std=0.1), drawn)
    assert type(VisBioRestorationPipeline.from_pretrained(tiny_pipeline_dir)) is VisBioRestorationPipeline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_std": 0}, "there is nothing to restore: give the image's `noise_std`, or a `factor`"),
        ({"noise_std": 25}, "`noise_std` must be from 0 to 1, where white is 1, but is 25"),
        ({"noise_std": float("nan")}, "but is nan"),
        ({"factor": 3}, "`factor` must be a whole number that divides 8 and 8, but is 3"),
        ({"factor": 0}, "but is 0"),
        ({"factor": 2}, "`image` is 8 x 8 pixels, but for a result of 8 x 8 by `factor` 2 it must be 4 x 4: resize"),
        ({"image": [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]}, "`image` is 8 x 9 pixels"),
        ({"image": None}, "`image` must be a PIL image, an array, a tensor"),
        ({"image": torch.ones(3, 8, 8) * 1.2}, "reach from 1.2 to 1.2"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": ["a", "b", "c"], "image": torch.zeros(2, 3, 8, 8)}, "2 in `image` for 3 prompts"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number from 1, but is 0"),
        ({"generator": [_seed(), _seed()]}, "got 2 generators for 1 images"),
        ({"output_type": "jpg"}, "must be pil, np, pt or latent"),
    ],
)
def test_arguments_that_cannot_work(restore, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        restore(**{"image": _pixels(), "noise_std": 0.1, "num_inference_steps": 1, **arguments})
    assert "\n" not in str(error.value)


def test_a_scheduler_of_another_kind_of_model(restore):
    restore.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler .* is for another kind of model"):
        _draw(restore, _pixels(), noise_std=0.1)
