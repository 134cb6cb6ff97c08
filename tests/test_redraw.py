"""Images drawn over images: strength, schedulers against a closed form, known pixels, and what is refused."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioPipeline
from visbio_diffusers.pipelines.schedulers import (
    FROM_NOISE,
    SCHEDULERS,
    last_timesteps,
    prepare_timesteps,
    step_arguments,
)


STEPS = 5
LEADING = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # cannot trail
MIDWAY = [name for name in SCHEDULERS if name not in FROM_NOISE]


def _seed(number=0):
    return torch.Generator().manual_seed(number)


def _picture(size=8, seed=3):
    pixels = torch.randint(0, 256, (size, size, 3), generator=_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _mask(size=8):
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : size // 2, size // 4 :] = 255
    return Image.fromarray(mask)


def _use(pipe, name, **config):
    spacing = {"timestep_spacing": "leading"} if name in LEADING or name == "LMSDiscreteScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **spacing, **config)


@pytest.fixture
def img2img(tiny_pipeline):
    pipe = VisBioImg2ImgPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inpaint(tiny_pipeline):
    pipe = VisBioInpaintPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, *args, seed=0, **kwargs):
    settings = {"num_inference_steps": STEPS, "output_type": "np", "generator": _seed(seed), **kwargs}
    return pipe(*args, **settings).images


@pytest.mark.parametrize("name", MIDWAY)
def test_strength_ends(tiny_pipeline, img2img, name):
    """1 is text-to-image from the same noise, 0 the image, and each step between goes further from the image."""
    _use(tiny_pipeline, name)
    img2img.scheduler = tiny_pipeline.scheduler
    image, settings = _picture(), {"guidance_scale": 2.0, "output_type": "latent", "prompt": "a cell"}
    drawn = _draw(tiny_pipeline, **settings)
    assert torch.equal(_draw(img2img, image=image, strength=1, **settings), drawn)
    kept = _draw(img2img, prompt="a cell", image=image, strength=0.19, output_type="pil")[0]  # no step of 5
    assert np.array_equal(kept, image) and img2img.num_timesteps == 0
    halfway = _draw(img2img, image=image, strength=0.6, **settings)
    assert img2img.num_timesteps == 3 * img2img.scheduler.order - (img2img.scheduler.order - 1)
    assert halfway.isfinite().all() and (halfway - drawn).abs().max() > 1e-2
    assert torch.equal(_draw(tiny_pipeline, **settings), drawn)  # the scheduler begins at noise again


@torch.no_grad()
def test_img2img_by_hand(img2img):
    image = _picture()
    scheduler = DDIMScheduler.from_config(img2img.scheduler.config)
    scheduler.set_timesteps(STEPS)
    a = scheduler.alphas_cumprod[scheduler.timesteps[2]]
    clean = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    sample = a.sqrt() * clean + (1 - a).sqrt() * torch.randn(1, 3, 8, 8, generator=_seed())
    text = img2img.encode_prompt("a cell", do_classifier_free_guidance=False)[0]
    for t in scheduler.timesteps[2:]:
        sample = scheduler.step(img2img.unet(sample, t, text).sample, t, sample).prev_sample
    drawn = _draw(img2img, "a cell", image, 0.6, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(drawn, sample, atol=1e-4, rtol=1e-4)


# Data: each pixel is drawn from N(0.1, 0.5^2), so that the best prediction has a closed form.
MEAN, SPREAD = 0.1, 0.5
BASE = DDIMScheduler(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
)
ALPHAS = BASE.alphas_cumprod.double().numpy()


def _best_velocity(sample, t):
    alphas = ALPHAS.clip(2**-24)
    log_snr = np.interp(float(t), range(1000), np.log(alphas / (1 - alphas)))
    alpha = 1 / (1 + np.exp(-log_snr)) if t < 999 else ALPHAS[-1]
    gain = (sample - alpha**0.5 * MEAN) / (alpha * SPREAD**2 + 1 - alpha)
    return alpha**0.5 * (1 - alpha) ** 0.5 * gain - (1 - alpha) ** 0.5 * (MEAN + alpha**0.5 * SPREAD**2 * gain)


def _redrawn(scheduler, steps, strength):
    """Return given and redrawn pixels, 128 x 128, of the data's exact mean and spread."""
    image, noise = (torch.randn(1, 1, 128, 128, generator=_seed(seed)) for seed in (1, 2))
    image = MEAN + SPREAD * (image - image.mean()) / image.std()
    noise = (noise - noise.mean()) / noise.std()
    timesteps = last_timesteps(scheduler, prepare_timesteps(scheduler, steps), strength)
    sample, generator = scheduler.add_noise(image, noise, timesteps[:1]), _seed()
    for t in timesteps:
        prediction = _best_velocity(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(prediction, t, sample, **step_arguments(scheduler, 0.0, generator)).prev_sample
    return image, sample


@pytest.mark.parametrize("strength", [0.25, 0.6])
@pytest.mark.parametrize("name", MIDWAY)
def test_redrawn_gaussian_data_keeps_mean_and_spread(name, strength):
    """Noised data has the marginal of the schedule, so that what is drawn from it has the spread of the data again."""
    spacing = {"timestep_spacing": "leading"} if name in LEADING else {}
    scheduler = getattr(diffusers, name).from_config(BASE.config, **spacing)
    image, sample = _redrawn(scheduler, 200 if "Ancestral" in name or "DDPM" in name else 60, strength)
    assert sample.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.015)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.6, 0.9])
def test_weaker_redrawing_stays_closer_to_the_image(strength):
    """DDIM is linear here, so that the result correlates with the image as the noised image does."""
    correlation = torch.corrcoef(torch.stack(_redrawn(BASE, 50, strength)).flatten(1))[0, 1].item()
    alpha = ALPHAS[int(1000 * strength) - 1]
    expected = alpha**0.5 * SPREAD / (alpha * SPREAD**2 + 1 - alpha) ** 0.5
    assert correlation == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", FROM_NOISE)
def test_scheduler_that_cannot_begin_at_an_image(img2img, inpaint, name):
    _use(img2img, name)
    inpaint.scheduler = img2img.scheduler
    for pipe, settings in ((img2img, {"strength": 0.5}), (inpaint, {"mask_image": _mask()})):
        with pytest.raises(ValueError, match=f"{name} cannot begin at an image: use DDIMScheduler"):
            _draw(pipe, "a cell", _picture(), **settings)
    assert _draw(img2img, "a cell", _picture(), strength=1.0).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", MIDWAY)
def test_known_pixels_are_the_given_ones(inpaint, name):
    _use(inpaint, name)
    image, mask = _picture(), _mask()
    known = np.array(mask) == 0
    for strength in (0.6, 1.0):
        drawn = np.array(_draw(inpaint, "a cell", image, mask, strength=strength, output_type="pil")[0])
        assert np.array_equal(drawn[known], np.array(image)[known])
        assert np.abs(drawn[~known].astype(int) - np.array(image)[~known]).max() > 10
    pixels = torch.rand(8, 8, 3, generator=_seed(5)).numpy()  # not multiples of 1/255
    drawn = _draw(inpaint, "a cell", pixels, mask)
    assert np.array_equal(drawn[0][known], pixels[known]) and drawn.dtype == np.float32


def test_strength_1_ignores_the_pixels_to_be_drawn(inpaint):
    image, mask = np.array(_picture()), np.array(_mask())
    other = np.where(mask[..., None] > 0, 255 - image, image)
    drawn = [_draw(inpaint, "a cell", each, mask) for each in (image, other)]
    assert np.array_equal(*drawn)
    drawn = [_draw(inpaint, "a cell", each, mask, strength=0.6) for each in (image, other)]
    assert not np.array_equal(*drawn)


def test_known_pixels_reach_the_drawn_ones(inpaint):
    image, mask = np.array(_picture()), np.array(_mask())
    other = np.where(mask[..., None] > 0, image, 255 - image)
    drawn = [_draw(inpaint, "a cell", each, mask)[0][mask > 0] for each in (image, other)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.05


def test_masks_of_one_kind(inpaint, img2img):
    image = _picture()
    assert np.array_equal(_draw(inpaint, "a cell", image, Image.new("1", (8, 8), 0), output_type="pil")[0], image)
    everything = _draw(inpaint, "a cell", image, Image.new("RGB", (8, 8), "white"), strength=0.6)
    assert np.array_equal(everything, _draw(img2img, "a cell", image, strength=0.6))


def test_the_same_image_in_every_form(inpaint):
    image, mask = _picture(), _mask()
    array, mask_array = np.array(image), np.array(mask)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = _draw(inpaint, "a cell", image, mask, strength=0.6)
    for given, its_mask in (
        (array, mask_array),
        (array.astype(np.float32) / 255, mask_array > 0),
        (array[None], mask_array[None, ..., None]),
        (tensor, torch.from_numpy(mask_array)),
        ((tensor / 255)[None], torch.from_numpy(mask_array)[None, None] / 255),
        ([image], [mask]),
    ):
        assert np.array_equal(_draw(inpaint, "a cell", given, its_mask, strength=0.6), expected)


def test_other_sizes_are_resized(inpaint, img2img):
    large, mask = _picture(32), _mask(32)
    drawn = _draw(inpaint, "a cell", large, mask)
    smaller = _draw(img2img, "a cell", large, strength=0.0)
    assert drawn.shape == smaller.shape == (1, 8, 8, 3)
    known = np.array(_mask(8)) == 0
    assert np.array_equal(drawn[0][known], smaller[0][known])
    shown = np.asarray(large.resize((8, 8), Image.Resampling.BICUBIC)) / 255
    assert np.abs(smaller[0] - shown).max() < 0.01
    assert _draw(img2img, "a cell", large, height=12, width=6).shape == (1, 12, 6, 3)


def test_an_image_is_the_same_alone_and_in_a_batch(inpaint):
    images, masks = [_picture(seed=1), _picture(seed=2)], [_mask(), Image.fromarray(255 - np.array(_mask()))]
    settings = {"strength": 0.8, "guidance_scale": 2.0, "eta": 1.0}
    prompts, seeds = ["a cell", "dust"], [5, 6, 7, 8]
    generators = [_seed(seed) for seed in seeds]
    together = _draw(inpaint, prompts, images, masks, num_images_per_prompt=2, generator=generators, **settings)
    for k, seed in enumerate(seeds):
        alone = _draw(inpaint, prompts[k // 2], images[k // 2], masks[k // 2], seed=seed, **settings)
        np.testing.assert_allclose(together[k : k + 1], alone, atol=1e-4)
    one_for_all = _draw(inpaint, prompts, images[0], masks[0], generator=[_seed(5), _seed(6)], **settings)
    np.testing.assert_allclose(one_for_all[:1], together[:1], atol=1e-4)


def test_given_noise_is_the_noise(img2img):
    noise = torch.randn(1, 3, 8, 8, generator=_seed())
    assert np.array_equal(_draw(img2img, "a cell", _picture(), latents=noise), _draw(img2img, "a cell", _picture()))


def test_output_types(inpaint):
    shown = {kind: _draw(inpaint, "a cell", _picture(), _mask(), output_type=kind) for kind in ("latent", "pt", "np")}
    torch.testing.assert_close(shown["pt"], (shown["latent"] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(shown["np"], shown["pt"].permute(0, 2, 3, 1).numpy())
    as_tuple = inpaint("a cell", _picture(), _mask(), num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0][0].size == (8, 8)


def test_callback_sees_the_known_pixels_and_may_end_the_drawing(inpaint):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].clone()))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    image, mask = _picture(), _mask()
    drawn = _draw(inpaint, "a cell", image, mask, strength=0.8, callback_on_step_end=callback, output_type="pil")[0]
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 799), (1, 599), (2, 399)]
    known = np.array(mask) == 0
    assert np.array_equal(np.array(drawn)[known], np.array(image)[known])
    assert (np.array(drawn)[~known] == 128).all()
    a = inpaint.scheduler.alphas_cumprod[599]
    clean = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    expected = a.sqrt() * clean + (1 - a).sqrt() * torch.randn(1, 3, 8, 8, generator=_seed())[0]
    torch.testing.assert_close(seen[0][2][0][:, known], expected[:, known], atol=1e-5, rtol=1e-5)


def test_latents_are_those_of_the_last_callback(inpaint):
    def blacken(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    options = {"num_inference_steps": 3, "callback_on_step_end": blacken, "output_type": "latent"}
    assert not inpaint("a cell", _picture(), _mask(), **options).images.any()


def test_parts_are_shared_saved_and_loaded(tiny_pipeline, tiny_pipeline_dir, tmp_path):
    expected = None
    for cls, settings in ((VisBioImg2ImgPipeline, {}), (VisBioInpaintPipeline, {"mask_image": _mask()})):
        pipe = cls.from_pipe(tiny_pipeline)
        assert type(pipe) is cls and all(pipe.components[k] is v for k, v in tiny_pipeline.components.items())
        back = VisBioPipeline.from_pipe(pipe)
        assert type(back) is VisBioPipeline and back.unet is tiny_pipeline.unet
        pipe.save_pretrained(tmp_path / cls.__name__)
        index = json.loads((tmp_path / cls.__name__ / "model_index.json").read_text())
        assert index["_class_name"] == cls.__name__ and index["unet"] == ["visbio_diffusers", "VisBioUNet"]
        loaded = DiffusionPipeline.from_pretrained(tmp_path / cls.__name__)
        assert type(loaded) is cls
        expected = _draw(pipe, "a cell", _picture(), **settings)
        assert np.array_equal(_draw(loaded, "a cell", _picture(), **settings), expected)
        assert type(cls.from_pretrained(tiny_pipeline_dir)) is cls  # of the folder of a VisBioPipeline


IMAGE, MASK = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.5}, "`strength` must be from 0 .* to 1 .*, but is 1.5"),
        ({"strength": -0.1}, "but is -0.1"),
        ({"strength": "0.5"}, "but is '0.5'"),
        ({"prompt": " "}, "`prompt` is empty: describe the image"),
        ({"image": None}, "`image` must be a PIL image, an array, a tensor or a list of them, but is NoneType"),
        ({"image": "cell.png"}, "but is str"),
        ({"image": []}, "but is an empty list"),
        ({"image": Image.new("L", (8, 8))}, r"`image` is a PIL image of mode L: give image.convert\('RGB'\)"),
        ({"image": Image.new("RGBA", (8, 8))}, "mode RGBA"),
        ({"image": IMAGE[..., :2]}, r"`image` must have 3 channels, .* \(1, 2, 8, 8\)"),
        ({"image": torch.zeros(8, 8, 3)}, r"before height and width in a tensor, but has .* \(1, 8, 8, 3\)"),
        ({"image": IMAGE.astype(np.int64)}, r"`image` must be uint8, or float in \[0, 1\], but is torch.int64"),
        ({"image": IMAGE - 1.0}, "its values reach from -1 to -1"),
        ({"image": IMAGE * np.nan}, "its values reach from nan to nan"),
        ({"image": [IMAGE] * 3}, "3 in `image` for 1 prompts: give one, or one for each prompt"),
        ({"mask_image": None}, "give `mask_image`, or use VisBioImg2ImgPipeline"),
        ({"mask_image": "mask.png"}, "`mask_image` must be a PIL image, .* but is str"),
        ({"mask_image": MASK[:4]}, "`mask_image` of 4 x 8 pixels must have the size of `image`, 8 x 8"),
        ({"mask_image": MASK + 7}, "`mask_image` has grey values: it takes 0 to keep and 1"),
        ({"mask_image": IMAGE}, "`mask_image` must have 1 channel, last in an array"),
        ({"mask_image": [MASK, MASK]}, "2 in `mask_image` for 1 in `image`"),
        ({"generator": [_seed(), _seed()]}, "got 2 generators for 1 images"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"`latents` must have shape \(1, 3, 8, 8\)"),
        ({"output_type": "jpg"}, "must be pil, np, pt or latent"),
    ],
)
def test_arguments_that_cannot_work(inpaint, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        _draw(inpaint, **{"prompt": "a cell", "image": IMAGE, "mask_image": MASK, **arguments})
    assert "\n" not in str(error.value)


def test_the_mask_that_the_error_names(inpaint):
    grey = Image.fromarray(np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8))
    drawn = _draw(inpaint, "a cell", _picture(), grey.point(lambda v: 255 * (v > 127)), output_type="pil")[0]
    known = np.array(grey) <= 127
    assert np.array_equal(np.array(drawn)[known], np.array(_picture())[known])


@pytest.fixture
def smooth(tiny_pipeline):
    """Return the tiny pipeline with predictions so weak that fixed-point iteration converges."""
    tiny_pipeline.unet.conv_out.weight.data *= 0.1
    return tiny_pipeline


def test_inverted_images_are_drawn_again_and_edited(smooth):
    pipe = VisBioImg2ImgPipeline.from_pipe(smooth)
    pipe.set_progress_bar_config(disable=True)
    images, prompts = [_picture(seed=1), _picture(seed=2)], ["a cell", "dust"]
    settings = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "negative_prompt": "debris"}
    given = np.stack([np.array(image) for image in images]) / 255
    errors = []
    for num_iterations in (1, 3, 12):
        latents = pipe.invert(images, prompts, num_iterations=num_iterations, **settings)
        errors.append(np.abs(_draw(smooth, prompts, latents=latents, **settings) - given).max())
    assert latents.shape == (2, 3, 8, 8)
    assert errors[0] > 5 * errors[1] and errors[1] > 5 * errors[2] and errors[2] < 1e-3
    edited = _draw(smooth, ["dust", "dust"], latents=latents, **settings)
    assert np.abs(edited[0] - given[0]).max() > 1e-2 and np.abs(edited[1] - given[1]).max() < 1e-3


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (
            "DPMSolverMultistepScheduler",
            {},
            "only DDIM without clipping can be inverted: use DDIMScheduler.from_config",
        ),
        (None, {"num_iterations": 0}, "`num_iterations` must be a whole number from 1, but is 0"),
        (None, {"num_inference_steps": 0}, "`num_inference_steps` must be a whole number from 1"),
        (None, {"image": [IMAGE] * 2}, "2 in `image` for 1 prompts"),
        (None, {"prompt": ""}, "`prompt` is empty"),
    ],
)
def test_what_cannot_be_inverted(img2img, scheduler, arguments, message):
    if scheduler:
        _use(img2img, scheduler)
    with pytest.raises(ValueError, match=message) as error:
        img2img.invert(**{"image": IMAGE, "prompt": "a cell", **arguments})
    assert "\n" not in str(error.value)
