"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def visbio_data() -> Path:
    """Return the folder of the real data: `VISBIO_DATA`, else `shared/data` beside the project."""
    folder = Path(os.environ.get("VISBIO_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set VISBIO_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """Return the folder of a saved pipeline of real, tiny, untrained parts that draws 8 pixel images."""
    # Slow imports, for those tests that draw.
    import torch
    from diffusers import DDIMScheduler
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from visbio_diffusers import VisBioPipeline, VisBioUNet

    pieces = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]
    wordpiece = BertWordPieceTokenizer({word: index for index, word in enumerate(words)})
    tokenizer = BertTokenizerFast(tokenizer_object=wordpiece._tokenizer, model_max_length=160)
    torch.manual_seed(0)
    text_config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=160,
    )
    unet = VisBioUNet(
        sample_size=8,
        block_out_channels=(16, 32),
        num_transformer_layers=1,
        film_dim=32,
        cross_attention_dim=32,
        attention_head_dim=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    VisBioPipeline(unet, scheduler, BertModel(text_config), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dual_encoder_dir(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """Return the folder of a saved dual encoder of real, tiny, untrained parts that looks at 8 pixel images."""
    import torch
    from transformers import AutoTokenizer, BertModel, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from visbio_diffusers import VisBioVisionModel
    from visbio_diffusers.models.vision_visbio import VisBioVisionConfig

    torch.manual_seed(0)
    vision = VisBioVisionModel(VisBioVisionConfig(hidden_sizes=[8, 16], depths=[1], image_size=8))
    text = BertModel.from_pretrained(tiny_pipeline_dir / "text_encoder")
    folder = tmp_path_factory.mktemp("tiny-dual-encoder")
    VisionTextDualEncoderModel(vision_model=vision, text_model=text).save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
    VisionTextDualEncoderProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stable_diffusion_dir(tmp_path_factory) -> Path:
    """Return the folder of a tiny Stable Diffusion of random weights, which draws 16 pixel images."""
    import json

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = [chr(code) for code in range(97, 123)]
    words = [*pieces, *(f"{piece}</w>" for piece in pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=16, **ends,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae, text.eval(), tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("stable-diffusion")
    pipe.save_pretrained(folder)
    return folder


def _fill(module, std: float = 0.15):
    """Set all parameters to noise from a seed: none is zero, and no library's initialisation matters."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    return module.eval()


@pytest.fixture
def tiny_unet():
    """Return a function that makes a tiny VisBioUNet, with the arguments given, none of whose parameters is zero."""
    from visbio_diffusers import VisBioUNet

    def make(**config) -> VisBioUNet:
        small = {"block_out_channels": (16, 32, 48), "layers_per_block": 1, "num_transformer_layers": 2}
        widths = {"attention_head_dim": 16, "cross_attention_dim": 24, "film_dim": 32}
        return _fill(VisBioUNet(**{**small, **widths, **config}))

    return make


@pytest.fixture
def tiny_pipeline(tiny_pipeline_dir):
    """Return the tiny pipeline, none of whose parameters is zero, without its progress bar."""
    from visbio_diffusers import VisBioPipeline

    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    _fill(pipe.unet)
    _fill(pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_text(tiny_pipeline):
    """Return a tiny BERT and its tokenizer, one token a letter."""
    return tiny_pipeline.text_encoder, tiny_pipeline.tokenizer
