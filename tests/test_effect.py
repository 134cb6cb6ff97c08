"""Maps of given images: what a word does is the difference that leaving it out makes, and it lies where the cell is."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from visbio_diffusers import VisBioUNet
from visbio_diffusers.explanation.effect import attribute_image, leave_out, word_effects


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8))


def test_each_word_is_left_out_in_turn():
    found = leave_out("an eosinophil, Wright-Giemsa stain")
    expected = ["eosinophil, Wright-Giemsa stain", "an , Wright-Giemsa stain", "an eosinophil, stain"]
    assert found == [*expected, "an eosinophil, Wright-Giemsa"]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_effect_is_how_far_the_guess_of_the_clean_image_moves(tiny_pipeline, prediction_type):
    scheduler = DDIMScheduler.from_config(
        tiny_pipeline.scheduler.config, prediction_type=prediction_type, clip_sample=False
    )
    tiny_pipeline.register_modules(scheduler=scheduler)
    found = word_effects(tiny_pipeline, IMAGE, "a cell", levels=(0.4,), num_noises=2, seed=3)
    clean = torch.tensor(np.asarray(IMAGE) / 127.5 - 1).permute(2, 0, 1).float()
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    noised = scheduler.add_noise(clean.expand(2, -1, -1, -1), noise, torch.tensor([399, 399]))
    scheduler.set_timesteps(1000)
    guesses = []
    for text in ("a cell", "cell", "a"):
        states, _ = tiny_pipeline.encode_prompt([text], do_classifier_free_guidance=False)
        with torch.no_grad():
            predicted = tiny_pipeline.unet(noised, 399, encoder_hidden_states=states.expand(2, -1, -1)).sample
        guesses.append(scheduler.step(predicted, 399, noised).pred_original_sample)
    expected = [(each - guesses[0]).square().mean(dim=(0, 1)).sqrt() * 127.5 for each in guesses[1:]]
    assert found.words == ["a", "cell"] and found.maps.dtype == np.float32 and found.image is IMAGE
    np.testing.assert_allclose(found.maps, torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert found.maps.min() > 0 and np.abs(found.maps[0] - found.maps[1]).max() > 1e-3


def test_words_that_reach_no_layer_do_nothing(tiny_pipeline):
    torch.nn.init.zeros_(tiny_pipeline.unet.text_norm.weight)
    torch.nn.init.zeros_(tiny_pipeline.unet.text_norm.bias)
    np.testing.assert_allclose(word_effects(tiny_pipeline, IMAGE, "a cell").maps, 0, atol=1e-3)


def test_film_alone_has_effects_but_no_attention(tiny_pipeline):
    torch.manual_seed(0)
    tiny_pipeline.unet = VisBioUNet.from_config(tiny_pipeline.unet.config, use_cross_attention=False).eval()
    for parameter in tiny_pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert word_effects(tiny_pipeline, IMAGE, "a cell").maps.max() > 0
    with pytest.raises(ValueError, match="no cross-attention"):
        attribute_image(tiny_pipeline, IMAGE, "a cell")


def test_attention_of_a_given_image_is_shares(tiny_pipeline):
    found = attribute_image(tiny_pipeline, IMAGE, "a monocyte, stain")
    assert found.words == ["a", "monocyte", "stain"] and found.maps.shape == (3, 8, 12) and 0 < found.weight < 1
    np.testing.assert_allclose(found.maps.sum(axis=0), 1, atol=1e-5)
    again = attribute_image(tiny_pipeline, IMAGE, "a monocyte, stain")
    assert np.array_equal(again.maps, found.maps)
    other = attribute_image(tiny_pipeline, Image.fromarray(255 - np.asarray(IMAGE)), "a monocyte, stain")
    assert np.abs(other.maps - found.maps).max() > 1e-5


@pytest.mark.parametrize("explain", [attribute_image, word_effects])
@pytest.mark.parametrize(
    ("image", "prompt", "levels", "message"),
    [
        (IMAGE, "...", (0.5,), "has no word"),
        (IMAGE, "", (0.5,), "is empty"),
        (IMAGE, "a cell", (0.5, 1.5), "above 0 and at most 1"),
        (IMAGE, "a cell", (), "above 0 and at most 1"),
        (IMAGE.resize((7, 8)), "a cell", (0.5,), "multiples of"),
    ],
)
def test_what_cannot_be_explained_is_refused(tiny_pipeline, explain, image, prompt, levels, message):
    with pytest.raises(ValueError, match=message):
        explain(tiny_pipeline, image, prompt, levels=levels)


def test_latent_models_are_refused(tiny_stable_diffusion_dir):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir)
    with pytest.raises(ValueError, match="a StableDiffusionPipeline does not denoise pixels"):
        word_effects(pipe, IMAGE, "a cell")
