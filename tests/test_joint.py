"""Alignment within the training of a UNet: its losses by hand, and that nothing of it is in what is saved."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.alignment.joint import TokenAdapter, UNetWithHeads, token_distance


ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image.py"))


@pytest.fixture(scope="module")
def train(tiny_pipeline_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", train_images=images, train_labels=np.arange(16, dtype=np.uint8)[:, None] % 8)

    def run(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = ["--preset", "tiny", "--resolution", "8", "--pretrained_model_name_or_path", str(tiny_pipeline_dir)]
        argv += ["--dataset_name", str(folder / "set.npz"), "--caption_bank", "bloodmnist", "--save_dtype", "fp32"]
        argv += ["--output_dir", str(folder / name), "--max_train_steps", "2", *map(str, flags)]
        assert SCRIPT["main"](SCRIPT["parse"](SCRIPT["TextToImageConfig"], SCRIPT["PRESETS"], argv)) == 0
        return folder / name

    return run


def test_saved_is_the_unet_alone_and_both_terms_have_taught_it(train, tiny_dual_encoder_dir, tiny_pipeline_dir):
    weights = {}
    for name, flags in {
        "none": (),
        "caption": ("--alignment_weight", 0.5),
        "repa": ("--repa_weight", 0.5, "--repa_model", tiny_dual_encoder_dir),
        "masked": ("--repa_weight", 0.5, "--repa_model", tiny_dual_encoder_dir, "--repa_mask", 0.5),
    }.items():
        folder = train(name, *flags)
        weights[name] = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        assert weights[name].keys() == weights["none"].keys()
        VisBioPipeline.from_pretrained(folder / "pipeline")
    inner = [key for key in weights["none"] if key.startswith("mid_block")]
    for name in ("caption", "repa", "masked"):
        assert any(not torch.equal(weights[name][key], weights["none"][key]) for key in inner)


def test_joint_training_goes_on_where_it_stopped(train, tiny_dual_encoder_dir):
    flags = (
        "--alignment_weight",
        0.5,
        "--repa_weight",
        0.1,
        "--repa_model",
        tiny_dual_encoder_dir,
        "--repa_mask",
        0.3,
    )
    straight = train("straight", *flags, "--max_train_steps", 3)
    train("stopped", *flags, "--checkpointing_steps", 2)
    resumed = train("stopped", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert (straight / "loss.jsonl").read_bytes() == (resumed / "loss.jsonl").read_bytes()


def test_token_distance_by_hand():
    predicted, targets = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    visible = torch.tensor([True, False, True])
    cosines = [torch.cosine_similarity(predicted[i], targets[i], dim=1).mean() for i in (0, 2)]
    torch.testing.assert_close(token_distance(predicted, targets, visible), 1 - sum(cosines) / 2)
    assert token_distance(predicted, targets, visible & False) == 0
    with_class_token = torch.cat([torch.randn(3, 1, 5), torch.ones(3, 16, 5) * torch.arange(1, 6)], dim=1)
    assert token_distance(with_class_token[:, 1:5], with_class_token.to(torch.bfloat16), visible).abs() < 1e-2
    constant = torch.ones(3, 16, 5) * torch.arange(1, 6)
    torch.testing.assert_close(
        token_distance(constant[:, :4], constant, visible), torch.tensor(0.0), rtol=0, atol=1e-6
    )


def test_hidden_tokens_are_filled_in_from_the_others():
    torch.manual_seed(0)
    adapter, tokens = TokenAdapter(8, 3, mask_share=0.999), torch.randn(2, 4, 8)
    out = adapter(tokens)
    torch.testing.assert_close(out, out[:1, :1].expand(2, 4, 3))  # all hidden: all the same
    assert TokenAdapter(8, 3)(tokens).shape == (2, 4, 3)


def test_heads_see_the_bottleneck(tiny_unet):
    unet = tiny_unet()
    model = UNetWithHeads(unet, vision_width=6)
    assert not any("head" in name for name, _ in UNetWithHeads(tiny_unet(), captions=False).named_parameters())
    text = torch.randn(2, 3, 24)
    out = model(torch.randn(2, 3, 16, 16), torch.tensor([3, 5]), text, return_dict=False)[0]
    assert out.shape == (2, 3, 16, 16) and model.tokens.shape == (2, 16, 48)
    assert model.adapter(model.tokens).shape == (2, 16, 6) and not any("head" in name for name in unet.state_dict())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repa_weight", 1), "repa_weight and repa_model go together"),
        (("--repa_model", "x"), "repa_weight and repa_model go together"),
        (("--alignment_weight", -1), "must be at least 0"),
        (
            ("--alignment_weight", 1, "--unet_config", '{"_class_name": "UNet2DConditionModel"}'),
            "are for a VisBioUNet",
        ),
    ],
)
def test_settings_that_do_not_go_together(flags, message, train, capsys):
    with pytest.raises(SystemExit):
        train("refused", *flags)
    assert message in capsys.readouterr().err
