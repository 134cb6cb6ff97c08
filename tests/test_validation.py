"""Images drawn during a training: when, by which weights, and without a trace in the training itself."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image

from visbio_diffusers import EmbeddingCache, VisBioPipeline
from visbio_diffusers.validation import averaged_weights, validation_hook


def _hook(pipe, folder, ema=None, prompts=("a cell", "dust"), every=2):
    embed = EmbeddingCache(["", *prompts], pipe.text_encoder, pipe.tokenizer, folder / "cache")
    without_text = VisBioPipeline(unet=pipe.unet, scheduler=pipe.scheduler, text_encoder=None, tokenizer=None)
    return validation_hook(Accelerator(cpu=True), lambda: without_text, embed, ema, list(prompts), 2, every, folder)


def test_draws_every_so_many_steps_and_leaves_the_training_alone(tiny_pipeline, tmp_path):
    tiny_pipeline.unet.train()
    before = torch.get_rng_state()
    hook = _hook(tiny_pipeline, tmp_path)
    for step in range(1, 6):
        hook(step, {})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["step-0000002.png", "step-0000004.png"]
    assert torch.equal(torch.get_rng_state(), before) and tiny_pipeline.unet.training
    first, second = (np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png")))
    assert np.array_equal(first, second) and first.std() > 1  # the same seeds, and nothing was trained


def test_no_prompts_no_images(tiny_pipeline, tmp_path):
    _hook(tiny_pipeline, tmp_path, prompts=())(2, {})
    assert not list(tmp_path.glob("*.png"))


def test_averaged_weights_draw_and_the_trained_ones_come_back(tiny_pipeline, tmp_path):
    unet = tiny_pipeline.unet
    ema = EMAModel(unet.parameters())
    _hook(tiny_pipeline, tmp_path / "averaged")(2, {})
    with torch.no_grad():
        unet.conv_in.weight.mul_(3)
    trained = unet.conv_in.weight.clone()
    _hook(tiny_pipeline, tmp_path / "averaged", ema)(4, {})
    _hook(tiny_pipeline, tmp_path / "trained")(4, {})
    averaged, again, other = (path.read_bytes() for path in sorted(tmp_path.glob("*/*.png")))
    assert averaged == again != other
    assert torch.equal(unet.conv_in.weight, trained)
    with pytest.raises(KeyboardInterrupt), averaged_weights(unet, ema):
        assert not torch.equal(unet.conv_in.weight, trained)
        raise KeyboardInterrupt
    assert torch.equal(unet.conv_in.weight, trained)
