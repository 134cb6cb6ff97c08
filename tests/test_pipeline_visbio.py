"""VisBioPipeline: what it draws equals a loop written here by hand; what it refuses, and what it says then."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from transformers import BertConfig, BertModel

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioPipeline
from visbio_diffusers.load import load_pipeline
from visbio_diffusers.pipelines.schedulers import (
    COSINE_SPACED,
    SCHEDULERS,
    cosine_timesteps,
    prepare_timesteps,
    step_arguments,
)
from visbio_diffusers.text import encode_text


STEPS = 4


def _seeds(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw(pipe, *args, seed=0, **kwargs):
    settings = {"num_inference_steps": STEPS, "guidance_interval": (0.0, 1.0), "output_type": "latent", **kwargs}
    return pipe(*args, **{"generator": torch.Generator().manual_seed(seed), **settings}).images


@torch.no_grad()
def _by_hand(pipe, prompt_at, negative, scale, rescale=0.0, interval=(0.0, 1.0)):
    """Denoise one 8 pixel image with classifier-free guidance in two separate calls; `prompt_at` gives step k's."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, t in enumerate(scheduler.timesteps):
        text, no_text = (encode_text(pipe.text_encoder, pipe.tokenizer, [each]) for each in (prompt_at(k), negative))
        prediction = pipe.unet(sample, t, text).sample
        if interval[0] <= t / 1000 <= interval[1]:
            uncond = pipe.unet(sample, t, no_text).sample
            guided = uncond + scale * (prediction - uncond)
            prediction = (1 - rescale) * guided + rescale * guided * prediction.std() / guided.std()
        sample = scheduler.step(prediction, t, sample).prev_sample
    return sample


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 3.0},
        {"scale": 3.0, "negative": "an empty field, no cell at all"},
        {"scale": 3.0, "rescale": 0.7},
        {"scale": 3.0, "interval": (0.3, 0.8)},
        {"scale": 1.0},
    ],
)
def test_guidance_by_hand(tiny_pipeline, settings):
    scale, rescale = settings["scale"], settings.get("rescale", 0.0)
    negative, interval = settings.get("negative", ""), settings.get("interval", (0.0, 1.0))
    image = _draw(
        tiny_pipeline,
        "a monocyte",
        guidance_scale=scale,
        guidance_rescale=rescale,
        guidance_interval=interval,
        negative_prompt=negative,
    )
    expected = _by_hand(tiny_pipeline, lambda k: "a monocyte", negative, scale, rescale, interval)
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)
    assert (image - _by_hand(tiny_pipeline, lambda k: "a monocyte", "", 2.0)).abs().max() > 1e-2


def test_without_guidance_the_negative_prompt_is_not_even_encoded(tiny_pipeline):
    assert tiny_pipeline.encode_prompt("a cell", do_classifier_free_guidance=False)[1] is None
    sizes = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    plain = _draw(tiny_pipeline, "a cell", guidance_scale=1.0)
    assert torch.equal(_draw(tiny_pipeline, "a cell", guidance_scale=1.0, negative_prompt="dust"), plain)
    assert torch.equal(_draw(tiny_pipeline, "a cell", guidance_scale=4.0, guidance_interval=(0.0, 0.0)), plain)
    assert set(sizes) == {1}


def test_embeds_of_encode_prompt_draw_the_same(tiny_pipeline):
    prompts, negative = ["a monocyte", "a much longer description of a cell"], "dust"
    image = _draw(
        tiny_pipeline, prompts, negative_prompt=negative, num_images_per_prompt=2, generator=_seeds(*range(4))
    )
    embeds, negative_embeds = tiny_pipeline.encode_prompt(prompts, negative_prompt=negative)
    assert embeds.shape == negative_embeds.shape
    again = _draw(
        tiny_pipeline,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        num_images_per_prompt=2,
        generator=_seeds(*range(4)),
    )
    assert torch.equal(image, again)
    shorter = tiny_pipeline.encode_prompt(negative, do_classifier_free_guidance=False)[0].repeat(2, 1, 1)
    again = _draw(
        tiny_pipeline,
        prompt_embeds=embeds,
        negative_prompt_embeds=shorter,
        num_images_per_prompt=2,
        generator=_seeds(*range(4)),
    )
    torch.testing.assert_close(image, again, atol=1e-4, rtol=1e-4)


def test_an_image_is_the_same_alone_and_in_a_batch(tiny_pipeline):
    settings = {"eta": 1.0, "guidance_scale": 2.0}  # noise in each step, too
    together = _draw(
        tiny_pipeline, ["a cell", "dust"], num_images_per_prompt=2, generator=_seeds(5, 6, 7, 8), **settings
    )
    for k, (prompt, seed) in enumerate([("a cell", 5), ("a cell", 6), ("dust", 7), ("dust", 8)]):
        alone = _draw(tiny_pipeline, prompt, generator=_seeds(seed), **settings)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
    assert (together[0] - _draw(tiny_pipeline, "a cell", seed=5, guidance_scale=2.0)[0]).abs().max() > 0.1  # eta


def test_given_noise_is_the_start(tiny_pipeline):
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_draw(tiny_pipeline, "a cell", latents=noise), _draw(tiny_pipeline, "a cell", seed=0))
    assert torch.equal(noise, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_other_sizes_than_the_trained_one(tiny_pipeline):
    assert _draw(tiny_pipeline, "a cell").shape == (1, 3, 8, 8)
    assert _draw(tiny_pipeline, ["a cell", "dust"], height=12, width=6).shape == (2, 3, 12, 6)


@pytest.mark.parametrize(
    ("scheduler", "argument"), [("DPMSolverMultistepScheduler", "timesteps"), ("EulerDiscreteScheduler", "sigmas")]
)
def test_custom_steps(tiny_pipeline, scheduler, argument):
    """The scheduler's own ones, given, change nothing; Euler's sigmas end in the 0 of the clean image."""
    tiny_pipeline.scheduler = getattr(diffusers, scheduler).from_config(tiny_pipeline.scheduler.config)
    image = _draw(tiny_pipeline, "a cell", num_inference_steps=5)
    steps = getattr(tiny_pipeline.scheduler, argument).tolist()
    again = _draw(tiny_pipeline, "a cell", **{argument: steps})
    assert tiny_pipeline.num_timesteps == 5
    torch.testing.assert_close(again, image, atol=1e-3, rtol=1e-3)
    _draw(tiny_pipeline, "a cell", **{argument: steps[:1] + steps[2:]})
    assert tiny_pipeline.num_timesteps == 4


def test_a_model_is_drawn_with_its_own_defaults(tiny_pipeline, tmp_path):
    pipe = VisBioPipeline(**tiny_pipeline.components, num_inference_steps=6, guidance_scale=2.0)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = VisBioPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    image = loaded("a cell", generator=_seeds(0), output_type="latent").images
    assert loaded.num_timesteps == 6 and loaded.guidance_scale == 2
    said = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "latent"}
    assert torch.equal(loaded("a cell", generator=_seeds(0), **said).images, image)
    other = VisBioImg2ImgPipeline.from_pipe(loaded)
    assert other.config.num_inference_steps == 6 and other.config.guidance_scale == 2
    loaded("a cell", num_inference_steps=2, guidance_scale=1, generator=_seeds(0))
    assert loaded.num_timesteps == 2 and loaded.guidance_scale == 1


def test_output_types(tiny_pipeline):
    latents = _draw(tiny_pipeline, "a cell") * 0.3  # both sides of the clip at [-1, 1]
    shown = {}
    for output_type in ("latent", "pt", "np", "pil"):
        replace = {"callback_on_step_end": lambda pipe, i, t, tensors: {"latents": latents.clone()}}
        shown[output_type] = _draw(tiny_pipeline, "a cell", output_type=output_type, **replace)
    assert torch.equal(shown["latent"], latents)
    torch.testing.assert_close(shown["pt"], (latents / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(shown["np"], shown["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(shown["pil"][0]), (shown["np"][0] * 255).round().astype(np.uint8))
    as_tuple = tiny_pipeline("a cell", num_inference_steps=1, generator=_seeds(0), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0][0].size == (8, 8)


def test_grey_images(tiny_pipeline, tiny_unet):
    unet = tiny_unet(in_channels=1, out_channels=1, cross_attention_dim=32, sample_size=8)
    pipe = VisBioPipeline(unet, tiny_pipeline.scheduler, tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    assert pipe("a chest", num_inference_steps=1).images[0].mode == "L"


def test_callback_may_replace_prompt_and_end_the_drawing(tiny_pipeline):
    embeds = tiny_pipeline.encode_prompt("dust", do_classifier_free_guidance=False)[0]
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        pipe._interrupt = step == len(seen_until) - 1
        return {"prompt_embeds": embeds} if step == 1 else tensors

    seen_until = range(STEPS)
    inputs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    image = _draw(tiny_pipeline, "a cell", guidance_scale=1.0, **inputs)
    expected = _by_hand(tiny_pipeline, lambda k: "a cell" if k < 2 else "dust", "", 1.0)
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert seen[0] == (0, 999, ["latents", "prompt_embeds"])

    seen.clear()
    seen_until = range(2)
    halfway = _draw(tiny_pipeline, "a cell", guidance_scale=1.0, **inputs)
    assert len(seen) == 2 and (halfway - image).abs().max() > 0.1
    assert tiny_pipeline.interrupt


def test_lora_scale_reaches_the_unet(tiny_pipeline):
    plain = _draw(tiny_pipeline, "a cell")
    tiny_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_adapter = _draw(tiny_pipeline, "a cell")
    assert (with_adapter - plain).abs().max() > 1e-3
    off = _draw(tiny_pipeline, "a cell", cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)


def test_half_precision_draws_the_same_image(tiny_pipeline):
    full = _draw(tiny_pipeline, "a cell", output_type="pt")
    tiny_pipeline.to(dtype=torch.bfloat16)
    latents = _draw(tiny_pipeline, "a cell")
    assert latents.dtype == torch.float32
    assert (_draw(tiny_pipeline, "a cell", output_type="pt") - full).abs().mean() < 0.03


def test_golden_slice(tiny_pipeline):
    """The upper left 3x3 pixels of the green channel change only when the numbers of model or sampler do."""
    image = _draw(tiny_pipeline, "a neutrophil", guidance_scale=2.0)[0, 1, :3, :3]
    expected = [[-2.2907, 0.6635, 0.2933], [-2.5777, -0.2895, -0.6293], [0.9431, -0.7575, -1.5291]]
    torch.testing.assert_close(image, torch.tensor(expected), atol=2e-3, rtol=0)


def test_truncated_prompt_is_shown(tiny_pipeline, caplog):
    """Each letter is a token, and two more are [CLS] and [SEP]."""
    tiny_pipeline.tokenizer.model_max_length = 12
    with caplog.at_level(logging.WARNING):
        embeds = tiny_pipeline.encode_prompt("round cells")[0]
        assert not caplog.records
        cut = tiny_pipeline.encode_prompt("round cells in pink")[0]
        tiny_pipeline.encode_prompt("a cell", negative_prompt="dust and debris")
    assert torch.equal(cut, embeds)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "the text encoder takes 12 tokens; this end of the prompt is cut off: 'in pink'"
    assert second.endswith("'ris'")


EMBEDS = torch.ones(2, 5, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either `prompt` or `prompt_embeds`"),
        ({"prompt": "a", "prompt_embeds": EMBEDS}, "one of them, not both"),
        ({"prompt": ""}, "`prompt` is empty: describe the image"),
        ({"prompt": ["a cell", "  \n"]}, "`prompt` is empty"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": 7}, "must be a text or a list of texts, but is int"),
        ({"prompt": ["a", None]}, "is a list with NoneType"),
        ({"prompt": ("a", "b")}, "but is tuple"),
        ({"prompt": "a", "negative_prompt": 7}, "`negative_prompt` must be a text"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "2 entries in `negative_prompt` for 1 prompts"),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": EMBEDS},
            "`negative_prompt_embeds`, not both",
        ),
        ({"prompt_embeds": EMBEDS, "negative_prompt": ["b"]}, "1 entries in `negative_prompt` for 2 prompts"),
        ({"prompt_embeds": EMBEDS[..., :7]}, r"must have shape \(batch, tokens, 32\).* but has \(2, 5, 7\)"),
        ({"prompt_embeds": EMBEDS[0]}, r"but has \(5, 32\)"),
        (
            {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:1]},
            "1 `negative_prompt_embeds` for 2 prompts: give one each",
        ),
        ({"prompt": "a", "negative_prompt_embeds": EMBEDS}, "2 `negative_prompt_embeds` for 1 prompts"),
        ({"prompt": "a", "height": 9}, "`height` and `width` must be multiples of 2, but are 9 and 8"),
        ({"prompt": "a", "width": -2}, "are 8 and -2"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "must be at least 1, but is 0"),
        ({"prompt": "a", "num_inference_steps": 0}, "must be a whole number from 1, but is 0"),
        ({"prompt": "a", "guidance_interval": (0.5, 0.2)}, r"must be \(low, high\) within \[0, 1\]"),
        ({"prompt": "a", "generator": _seeds(1, 2)}, "got 2 generators for 1 images: give one, or one for each"),
        (
            {"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)},
            r"must have shape \(1, 3, 8, 8\), but has \(1, 3, 4, 4\)",
        ),
        ({"prompt": "a", "output_type": "jpg"}, "must be pil, np, pt or latent, but is 'jpg'"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"not \['noise'\]"),
        ({"prompt": "a", "timesteps": [900, 100]}, "DDIMScheduler takes no custom `timesteps`"),
        ({"prompt": "a", "timesteps": [900], "sigmas": [1.0]}, "either `timesteps` or `sigmas`"),
    ],
)
def test_arguments_that_cannot_work(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        _draw(tiny_pipeline, **arguments)
    assert "\n" not in str(error.value)


def test_text_encoder_of_another_width(tiny_pipeline, tiny_unet):
    parts = {**tiny_pipeline.components, "unet": tiny_unet(cross_attention_dim=24, sample_size=8)}
    with pytest.raises(ValueError, match="width 32, this model takes 24"):
        _draw(VisBioPipeline(**parts), "a cell")


def test_pubmedbert_in_its_exact_shape_encodes_for_a_unet_of_its_width(tiny_pipeline, tiny_unet):
    """110 M random parameters in the configuration of microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract."""
    config = BertConfig(
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        pad_token_id=0,
    )
    parts = {
        **tiny_pipeline.components,
        "text_encoder": BertModel(config).eval(),
        "unet": tiny_unet(cross_attention_dim=768, sample_size=8),
    }
    pipe = VisBioPipeline(**parts)
    assert sum(parameter.numel() for parameter in pipe.text_encoder.parameters()) > 109_000_000
    images = _draw(pipe, ["a segmented neutrophil", "a monocyte"], num_inference_steps=2)
    assert images.isfinite().all() and (images[0] - images[1]).abs().max() > 0.1


def test_text_encoder_of_a_folder_with_pytorch_model_bin_alone(tiny_pipeline, tmp_path):
    encoder = tiny_pipeline.text_encoder
    encoder.config.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = BertModel.from_pretrained(tmp_path, weights_only=True)
    pipe = VisBioPipeline(**{**tiny_pipeline.components, "text_encoder": loaded})
    assert torch.equal(_draw(pipe, "a monocyte"), _draw(tiny_pipeline, "a monocyte"))


# Schedulers. Data: each pixel is drawn from N(0.1, 0.5^2), so the best prediction has a closed form.
MEAN, SPREAD = 0.1, 0.5
BASE = DDIMScheduler(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
)
ALPHAS_CUMPROD = BASE.alphas_cumprod.double().numpy()


def _best_prediction(sample, t, prediction_type):
    """Return the best prediction from x = sqrt(a) image + sqrt(1 - a) noise; between timesteps log SNR is linear.

    E[image | x] = mean + sqrt(a) spread^2 / (a spread^2 + 1 - a) (x - sqrt(a) mean).
    """
    alphas = ALPHAS_CUMPROD.clip(2**-24)
    log_snr = np.interp(float(t), range(1000), np.log(alphas / (1 - alphas)))
    alpha = 1 / (1 + np.exp(-log_snr)) if t < 999 else ALPHAS_CUMPROD[-1]
    gain = 1 / (alpha * SPREAD**2 + 1 - alpha)
    image = MEAN + alpha**0.5 * SPREAD**2 * gain * (sample - alpha**0.5 * MEAN)
    noise = (1 - alpha) ** 0.5 * gain * (sample - alpha**0.5 * MEAN)
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
    return {"epsilon": noise, "sample": image, "v_prediction": velocity}[prediction_type]


def _sampled(scheduler, steps, eta=0.0, spacing=None):
    """Return mean and spread of 128 x 128 pixels, from standardised noise so that they have no error of their own."""
    timesteps = prepare_timesteps(scheduler, steps, spacing=spacing)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 128, 128, generator=generator)
    sample = (sample - sample.mean()) / sample.std() * scheduler.init_noise_sigma
    for t in timesteps:
        prediction = _best_prediction(scheduler.scale_model_input(sample, t), t, scheduler.config.prediction_type)
        sample = scheduler.step(prediction, t, sample, **step_arguments(scheduler, eta, generator)).prev_sample
    return sample.mean().item(), sample.std().item()


def _scheduler(name, **config):
    return getattr(diffusers, name).from_config(BASE.config, **config)


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [
        ("DDIMScheduler", 60, {}),
        ("DDIMScheduler", 60, {"prediction_type": "sample"}),
        ("DDIMScheduler", 60, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        ("DDPMScheduler", 200, {}),
        ("DDPMScheduler", 50, {"variance_type": "fixed_large"}),
        ("DPMSolverMultistepScheduler", 25, {}),
        ("DPMSolverMultistepScheduler", 10, {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", 50, {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", 25, {}),
        ("EulerDiscreteScheduler", 60, {}),
        ("EulerDiscreteScheduler", 60, {"timestep_spacing": "leading", "rescale_betas_zero_snr": False}),
        ("DEISMultistepScheduler", 25, {}),
        ("DPMSolverSinglestepScheduler", 25, {}),
        ("EulerAncestralDiscreteScheduler", 200, {}),
        ("HeunDiscreteScheduler", 25, {"timestep_spacing": "leading"}),
        ("KDPM2AncestralDiscreteScheduler", 50, {"timestep_spacing": "leading"}),
        ("KDPM2DiscreteScheduler", 25, {"timestep_spacing": "leading"}),
        ("LMSDiscreteScheduler", 10, {"timestep_spacing": "leading"}),
        ("PNDMScheduler", 50, {}),
    ],
)
def test_scheduler_recovers_mean_and_spread_of_a_gaussian(name, steps, config):
    mean, spread = _sampled(_scheduler(name, **config), steps)
    assert name in SCHEDULERS
    assert spread == pytest.approx(SPREAD, rel=0.03)
    assert mean == pytest.approx(MEAN, abs=0.015)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("DDIMScheduler", {}), ("EulerDiscreteScheduler", {}), ("DDIMScheduler", {"eta": 1.0})]
)
def test_error_of_first_order_schedulers_halves_with_twice_the_steps(name, kwargs):
    few, many = (SPREAD - _sampled(_scheduler(name), steps, **kwargs)[1] for steps in (25, 50))
    assert 0 < many and 0.4 < many / few < 0.65


@pytest.mark.parametrize("steps", [1, 2, 12, 100, 1000])
def test_cosine_timesteps(steps):
    found = np.array(cosine_timesteps(steps))
    wanted = 999 * (1 - np.cos(np.pi / 2 * np.arange(steps, 0, -1) / steps) ** 3.5)
    assert found[0] == 999 and found[-1] >= 0 and len(found) == steps
    assert (np.diff(found) < 0).all()
    if steps < 20:
        assert abs(found - wanted).max() <= 0.5
    solver = _scheduler("DPMSolverMultistepScheduler")
    assert prepare_timesteps(solver, steps, spacing="cosine").tolist() == found.tolist()


@pytest.mark.parametrize("name", COSINE_SPACED)
def test_cosine_spacing_recovers_mean_and_spread_of_a_gaussian(name):
    mean, spread = _sampled(_scheduler(name), 25, spacing="cosine")
    assert (mean, spread) == (pytest.approx(MEAN, abs=0.015), pytest.approx(SPREAD, rel=0.05))


def test_more_cosine_timesteps_than_there_are():
    with pytest.raises(ValueError, match="`num_inference_steps` must be at most 1000, but is 1001"):
        prepare_timesteps(_scheduler("UniPCMultistepScheduler"), 1001, spacing="cosine")


def test_cosine_timesteps_lead_nearer_to_where_many_steps_would():
    """Measured on a real model, from the same noise: nearer at the same cost."""
    pipe = load_pipeline(None, "cpu")[0]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)

    def draw(steps, spacing):
        pipe.register_to_config(timestep_spacing=spacing)
        noise = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        options = {"guidance_scale": 1.0, "latents": noise, "output_type": "np"}
        return pipe(["a neutrophil", "a platelet"], num_inference_steps=steps, **options).images

    best = draw(40, None)
    even, cosine = (np.sqrt(((draw(12, spacing) - best) ** 2).mean()) for spacing in (None, "cosine"))
    assert cosine < 0.8 * even


def test_unipc_takes_custom_timesteps():
    own, custom = _scheduler("UniPCMultistepScheduler"), _scheduler("UniPCMultistepScheduler")
    timesteps = prepare_timesteps(own, 12).tolist()
    assert prepare_timesteps(custom, 25, timesteps=timesteps).tolist() == timesteps
    assert custom.num_inference_steps == 12
    torch.testing.assert_close(custom.sigmas, own.sigmas, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler takes no custom `sigmas`"):
        prepare_timesteps(custom, 12, sigmas=[1.0, 0.5])


def test_spacing_is_left_alone_where_it_cannot_be_set():
    """Others keep even steps; what a call gives goes before what the pipeline keeps."""
    ddim, even = _scheduler("DDIMScheduler"), _scheduler("DDIMScheduler")
    assert torch.equal(prepare_timesteps(ddim, 12, spacing="cosine"), prepare_timesteps(even, 12))
    solver = _scheduler("DPMSolverMultistepScheduler")
    assert prepare_timesteps(solver, 12, timesteps=[999, 500], spacing="cosine").tolist() == [999, 500]
    with pytest.raises(ValueError, match='"cosine" or None, but is "?\'quadratic'):
        prepare_timesteps(solver, 12, spacing="quadratic")


@pytest.mark.parametrize(
    ("name", "config", "way_out"),
    [
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": False}, {"timestep_spacing": "leading"}),
        ("HeunDiscreteScheduler", {}, {"timestep_spacing": "leading"}),
        ("KDPM2DiscreteScheduler", {}, {"timestep_spacing": "leading"}),
        ("KDPM2AncestralDiscreteScheduler", {}, {"timestep_spacing": "leading"}),
        ("LMSDiscreteScheduler", {}, {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {"use_karras_sigmas": False}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, {"use_flow_sigmas": False}),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, {"use_exponential_sigmas": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"use_karras_sigmas": False}),
        ("DDIMScheduler", {"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": False}),
    ],
)
def test_scheduler_that_fails_by_nature_says_the_way_out(name, config, way_out):
    """The argument named in the message leads to a scheduler that is right."""
    [(argument, value)] = way_out.items()
    shown = f'"{value}"' if isinstance(value, str) else value
    with pytest.raises(
        ValueError, match=rf"{name}\.from_config\(pipe\.scheduler\.config, {argument}={shown}\)"
    ) as error:
        prepare_timesteps(_scheduler(name, **config), 25)
    assert "\n" not in str(error.value)
    scheduler = _scheduler(name, **{**config, **way_out})
    assert _sampled(scheduler, 60)[1] == pytest.approx(SPREAD, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        "CMStochasticIterativeScheduler",
        "DDIMInverseScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "IPNDMScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ],
)
def test_scheduler_of_another_kind_of_model(tiny_pipeline, name):
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(
        ValueError, match=f"{name} .*is for another kind of model: use DDIMScheduler, DDPMScheduler"
    ) as error:
        _draw(tiny_pipeline, "a cell")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws(tiny_pipeline, name):
    """As `pipe.scheduler = X.from_config(pipe.scheduler.config)`, or with the spacing that the error names."""
    config = {"timestep_spacing": "leading"} if name[:3] in ("Heu", "KDP", "LMS") else {}
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config, **config)
    images = _draw(tiny_pipeline, ["a cell", "dust"], output_type="pt")
    assert images.isfinite().all() and images.std() > 0.05
    again = _draw(tiny_pipeline, ["a cell", "dust"], output_type="pt")
    assert torch.equal(images, again)


def test_schedulers_swap_back_and_forth(tiny_pipeline):
    image = _draw(tiny_pipeline, "a cell")
    for scheduler in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler):
        tiny_pipeline.scheduler = scheduler.from_config(tiny_pipeline.scheduler.config)
    assert torch.equal(_draw(tiny_pipeline, "a cell"), image)
