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
    from transformers import BertConfig, BertModel, BertTokenizer

    from visbio_diffusers import VisBioPipeline, VisBioUNet

    pieces = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=128)
    torch.manual_seed(0)
    text_config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
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
