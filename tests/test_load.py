"""Finding the shipped model, and loading pipelines whole or not at all."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel

from visbio_diffusers import VisBioPipeline, load


@pytest.mark.parametrize(
    "part",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "model_index.json",
        "tokenizer",
    ],
)
@pytest.mark.parametrize("damage", ["cut short", "absent"])
def test_model_cut_short_is_refused(part, damage, tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, folder)
    path = folder / part
    if path.is_dir():
        shutil.rmtree(path)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load the model") as error:
        load.load_pipeline(str(folder), "cpu")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_half_precision_weights_are_loaded_as_asked_for(tiny_pipeline_dir, tmp_path):
    """What ships has fp16 weights; left to themselves, Diffusers and Transformers load its parts differently."""
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.unet.half()
    pipe.text_encoder.half()
    pipe.save_pretrained(tmp_path)
    for name in ("float32", "bfloat16"):
        pipe, _ = load.load_pipeline(str(tmp_path), "cpu", name)
        assert pipe.unet.dtype == pipe.text_encoder.dtype == getattr(torch, name)


def test_shipped_model_is_found_in_a_wheel_and_beside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "visbio_diffusers"
    monkeypatch.setattr(load, "__file__", str(package / "load.py"))
    with pytest.raises(FileNotFoundError, match="lacks the model visbio-blood-28: give --model"):
        load.default_model()
    for place in (tmp_path, package):  # the second is looked into first
        folder = place / "model_cards" / "visbio-blood-28"
        folder.mkdir(parents=True)
        Path(folder, "model_index.json").write_text("{}")
        assert load.default_model() == folder


def test_a_pipeline_with_the_unet_of_diffusers_draws_and_is_loaded(tiny_pipeline, tmp_path):
    """The baseline of the benchmark is drawn from by the same code."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        in_channels=3,
        out_channels=3,
    )
    parts = {name: part for name, part in tiny_pipeline.components.items() if name != "unet"}
    pipe = VisBioPipeline(unet=unet, **parts)
    pipe.save_pretrained(tmp_path)
    loaded, facts = load.load_pipeline(str(tmp_path), "cpu")
    assert type(loaded.unet) is UNet2DConditionModel and len(facts["model_sha256"]) == 64
    loaded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 2}
    images = [
        each(["a", "a cell"], generator=torch.Generator().manual_seed(0), **options).images for each in (pipe, loaded)
    ]
    assert (images[0] == images[1]).all() and images[0].shape == (2, 8, 8, 3)


def test_another_pipeline_of_diffusers_is_loaded(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    pipe, facts = load.load_pipeline(str(tmp_path), "cpu")
    assert type(pipe) is DDIMPipeline and facts["model"] == tmp_path.name


def test_loading_says_nothing(tiny_pipeline_dir, caplog):
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]  # they do not propagate
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        load.load_pipeline(str(tiny_pipeline_dir), "cpu")
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert not caplog.messages


def test_the_classes_that_a_model_has_learned_are_known(tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, folder)
    assert "caption_banks" not in load.load_pipeline(str(folder), "cpu")[1]
    (folder / "training.json").write_text('{"caption_banks": ["bloodmnist", "pathmnist"]}')
    assert load.load_pipeline(str(folder), "cpu")[1]["caption_banks"] == "bloodmnist, pathmnist"
    assert load.training_sets(str(folder)) == []
    (folder / "training.json").write_text('{"config": {"dataset_name": ["bloodmnist"]}}')
    assert load.training_sets(str(folder)) == ["bloodmnist"]
