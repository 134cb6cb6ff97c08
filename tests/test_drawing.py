"""Settings of scripts that draw and measure."""

import numpy as np
import pytest

from visbio_diffusers.evaluation.drawing import DrawingConfig
from visbio_diffusers.evaluation.sampling import generate_images


def test_what_is_drawn_is_what_the_settings_say_and_is_kept(tiny_pipeline_dir, tmp_path):
    settings = {"output": str(tmp_path / "found.json"), "model": str(tiny_pipeline_dir), "device": "cpu", "seed": 3}
    config = DrawingConfig(**settings, num_inference_steps=2, guidance_scale=2.5, guidance_interval=[0.2, 0.9])
    pipe, facts = config.load()
    prompts = ["a band neutrophil"] * 3
    images = config.draw(pipe, facts, prompts)
    wanted = {"num_inference_steps": 2, "guidance_scale": 2.5, "guidance_interval": [0.2, 0.9]}
    assert config.options == wanted
    assert np.array_equal(images, generate_images(pipe, prompts, 3, **wanted).images)
    assert (images[0] != images[1]).any()
    del pipe.unet  # with which nothing more can be drawn
    assert np.array_equal(images, config.draw(pipe, facts, prompts))


def test_a_model_that_draws_otherwise_is_drawn_anew(tiny_pipeline_dir, tmp_path):
    config = DrawingConfig(output=str(tmp_path / "found.json"), model=str(tiny_pipeline_dir), device="cpu")
    pipe, facts = config.load()
    found = []
    for steps in (1, 2, 1):
        pipe.register_to_config(num_inference_steps=steps)
        found.append(config.draw(pipe, facts, ["a monocyte"]))
    assert (found[0] != found[1]).any() and np.array_equal(found[0], found[2])


def test_defaults_are_those_of_the_pipeline(tmp_path):
    config = DrawingConfig(output=str(tmp_path / "found.json"))
    assert config.options == {} and config.judges == tmp_path / "found" / "evaluators"


def test_half_precision_draws_nearly_the_same(tiny_pipeline_dir, tmp_path):
    settings = {"model": str(tiny_pipeline_dir), "device": "cpu", "num_inference_steps": 2}
    found = []
    for dtype in ("float32", "bfloat16"):
        config = DrawingConfig(output=str(tmp_path / "found.json"), dtype=dtype, **settings)
        found.append(config.draw(*config.load(), ["a monocyte"]).astype(int))
    assert 0 < np.abs(found[0] - found[1]).mean() < 5


@pytest.mark.parametrize("wrong", [{"output": "found.txt"}, {"batch_size": 0}, {"seed": -1}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DrawingConfig(**{"output": "found.json", **wrong})
