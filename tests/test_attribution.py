"""Maps of words: they are the attention of the half with text, and recording them changes nothing."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from transformers import AutoTokenizer

from visbio_diffusers import default_model
from visbio_diffusers.explanation.attribution import (
    AttentionRecorder,
    all_heads,
    attribute_image,
    attribute_words,
    word_tokens,
)


PROMPTS = ["a monocyte", "platelets, Wright-Giemsa stain"]


class IdentityValues:
    """An attention processor that also keeps what attention makes of an identity matrix: its probabilities."""

    def __init__(self, processor):
        self.processor, self.kept = processor, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, key_value=None):
        key = key_value[0].transpose(1, 2)  # (B, heads, L, D / heads)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        tokens = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        self.kept.append(F.scaled_dot_product_attention(query, key, tokens, attn_mask=attention_mask).mean(dim=1))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, key_value)


def seeds(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


def draw(pipe, count=2, **call):
    return pipe(PROMPTS, generator=seeds(count), num_inference_steps=3, **call).images


def same(images, others):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, others, strict=True))


def hooks(module):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_maps_are_shares_of_words_in_every_image(tiny_pipeline, guidance_scale):
    call = {"num_images_per_prompt": 2, "guidance_scale": guidance_scale, "height": 8, "width": 16}
    found = attribute_words(tiny_pipeline, PROMPTS, generator=seeds(4), num_inference_steps=3, **call)
    expected = [["a", "monocyte"]] * 2 + [["platelets", "Wright-Giemsa", "stain"]] * 2
    assert [each.words for each in found] == expected
    for each in found:
        assert each.maps.shape == (len(each.words), 8, 16) and each.maps.dtype == np.float32
        assert each.maps.min() >= 0 and 0 < each.weight < 1
        np.testing.assert_allclose(each.maps.sum(axis=0), 1, atol=1e-5)
    assert np.abs(found[0].maps - found[1].maps).max() > 1e-5  # of another seed


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_recording_changes_nothing(tiny_pipeline, guidance_scale):
    tiny_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    call = {"guidance_scale": guidance_scale, "guidance_interval": (0.0, 0.7)}
    before, count = draw(tiny_pipeline, **call), hooks(tiny_pipeline.unet)
    found = attribute_words(tiny_pipeline, PROMPTS, generator=seeds(2), num_inference_steps=3, **call)
    assert same([each.image for each in found], before)
    assert same(draw(tiny_pipeline, **call), before) and hooks(tiny_pipeline.unet) == count == 0


def test_hooks_are_gone_after_a_failure(tiny_pipeline):
    with pytest.raises(ValueError, match="multiples of"):
        attribute_words(tiny_pipeline, "a cell", height=7)
    assert hooks(tiny_pipeline.unet) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_maps_are_the_attention_of_the_half_with_text(tiny_pipeline, lora):
    if lora:
        tiny_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layer = tiny_pipeline.unet.mid_block.transformer_blocks[0].attn2
    layer.set_processor(IdentityValues(layer.processor))
    with AttentionRecorder(tiny_pipeline.unet, 2) as recorder:
        draw(tiny_pipeline, guidance_scale=3.0, negative_prompt="a thing out of focus")
    kept = torch.stack(layer.processor.kept)  # (steps, negative and positive, N, L)
    assert kept.shape[:3] == (3, 4, 16)
    expected = kept[:, 2:].mean(dim=0).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(recorder.token_maps(4, 4), expected)
    assert (kept[:, :2].mean(dim=0).transpose(1, 2).unflatten(2, (4, 4)) - expected).abs().max() > 1e-3


def test_padding_gets_nothing_and_shuffled_tokens_give_other_maps(tiny_pipeline):
    with AttentionRecorder(tiny_pipeline.unet, 2) as recorder:
        draw(tiny_pipeline, guidance_scale=1.0)
    maps = recorder.token_maps(8, 8)
    limit = len(tiny_pipeline.tokenizer(PROMPTS[0])["input_ids"])
    assert maps[0, limit:].abs().max() == 0 and maps[1, limit:].min() > 0
    (_, first), (_, word) = word_tokens(tiny_pipeline.tokenizer, PROMPTS[0], 160)
    shuffled = torch.randperm(limit, generator=torch.Generator().manual_seed(0))
    for tokens in (first, word):
        assert (maps[0][tokens].sum(dim=0) - maps[0][shuffled][tokens].sum(dim=0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "an eosinophil, Wright-Giemsa stain",
            {
                "an": ["an"],
                "eosinophil": ["eosinophil"],
                "Wright-Giemsa": ["wright", "-", "giemsa"],
                "stain": ["stain"],
            },
        ),
        ("Ein (Granulozyt).", {"Ein": ["e", "##in"], "Granulozyt": ["granulo", "##zy", "##t"]}),
    ],
)
def test_pieces_are_merged_to_words(text, words):
    tokenizer = AutoTokenizer.from_pretrained(default_model() / "tokenizer")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    found = {word: [pieces[k] for k in tokens] for word, tokens in word_tokens(tokenizer, text, 64)}
    assert found == words


def test_words_cut_off_are_left_out(tiny_text):
    assert [word for word, _ in word_tokens(tiny_text[1], "a cell with granules", 7)] == ["a", "cell"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_stable_diffusion_has_maps_too(tiny_stable_diffusion_dir, guidance_scale):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "height": 24, "width": 40}
    before = pipe(["a cell"] * 2, generator=seeds(2), **call).images
    found = attribute_words(pipe, ["a cell"] * 2, generator=seeds(2), **call)
    assert same([each.image for each in found], before)
    for each in found:
        assert each.words == ["a", "cell"] and each.maps.shape == (2, *np.asarray(each.image).shape[:2])
        np.testing.assert_allclose(each.maps.sum(axis=0), 1, atol=1e-5)


def test_without_cross_attention_words_have_no_places(tiny_unet):
    with pytest.raises(ValueError, match="VisBioUNet has no cross-attention"):
        AttentionRecorder(tiny_unet(use_cross_attention=False), 1)


@pytest.mark.parametrize(("prompt", "message"), [("...", "no word"), ("", "is empty"), ([], "empty list")])
def test_prompts_without_words_are_refused(tiny_pipeline, prompt, message):
    with pytest.raises(ValueError, match=message):
        attribute_words(tiny_pipeline, prompt)


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8))


def test_given_images_are_noised_and_read_once(tiny_pipeline):
    found = attribute_image(tiny_pipeline, IMAGE, "a monocyte, stain", levels=(0.4,), num_noises=2, seed=3)
    assert found.words == ["a", "monocyte", "stain"] and found.maps.shape == (3, 8, 12) and found.image is IMAGE
    np.testing.assert_allclose(found.maps.sum(axis=0), 1, atol=1e-5)
    clean = torch.tensor(np.asarray(IMAGE) / 127.5 - 1).permute(2, 0, 1).float()
    noise = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    signal = tiny_pipeline.scheduler.alphas_cumprod[399]
    states, _ = tiny_pipeline.encode_prompt(["a monocyte, stain"] * 2, do_classifier_free_guidance=False)
    with AttentionRecorder(tiny_pipeline.unet, 2) as recorder, torch.no_grad():
        tiny_pipeline.unet(signal.sqrt() * clean + (1 - signal).sqrt() * noise, 399, encoder_hidden_states=states)
    tokens = [places for _, places in word_tokens(tiny_pipeline.tokenizer, "a monocyte, stain", 160)]
    maps = recorder.token_maps(8, 12).mean(dim=0)
    expected = torch.stack([maps[places].sum(dim=0) for places in tokens])
    torch.testing.assert_close(torch.tensor(found.maps), expected / expected.sum(dim=0), rtol=1e-3, atol=1e-4)


def test_chosen_heads_are_read_alone(tiny_pipeline):
    heads = all_heads(tiny_pipeline.unet)
    assert heads == [(0, 0), (0, 1)]
    with ExitStack() as stack:
        recorders = [
            stack.enter_context(AttentionRecorder(tiny_pipeline.unet, 2, each))
            for each in (None, [heads[0]], [heads[1]])
        ]
        draw(tiny_pipeline, guidance_scale=1.0)
    both, first, second = (recorder.token_maps(8, 8) for recorder in recorders)
    torch.testing.assert_close(both, (first + second) / 2)
    assert (first - second).abs().max() > 1e-3
    for absent in ([(0, 2)], [(1, 0)], []):
        with pytest.raises(ValueError, match="no head"):
            AttentionRecorder(tiny_pipeline.unet, 2, absent)


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
def test_what_cannot_be_explained_is_refused(tiny_pipeline, image, prompt, levels, message):
    with pytest.raises(ValueError, match=message):
        attribute_image(tiny_pipeline, image, prompt, levels=levels)


def test_latent_models_are_refused(tiny_stable_diffusion_dir):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion_dir)
    with pytest.raises(ValueError, match="a StableDiffusionPipeline does not denoise pixels"):
        attribute_image(pipe, IMAGE, "a cell")
