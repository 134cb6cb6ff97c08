"""Rewards: what they measure on images of which it is known, and what is said of those that cannot be used."""

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from visbio_diffusers.alignment import load_dual_encoder
from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.load import default_model
from visbio_diffusers.rewards import find_reward


def plain(value, count=1, side=8):
    return torch.full((count, 3, side, side), float(value))


def discs(*centres, side=32, radius=4):
    """A bright image with dark discs."""
    rows, columns = np.mgrid[:side, :side]
    image = np.ones((side, side), dtype=np.float32)
    for row, column in centres:
        image[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = -1
    return torch.as_tensor(image).expand(1, 3, -1, -1)


def test_simple_rewards_by_hand():
    assert find_reward("brightness").score(torch.cat([plain(-1), plain(0), plain(1)]), [""] * 3).tolist() == [
        0,
        0.5,
        1,
    ]
    purple = torch.tensor([1.0, -1.0, 1.0])[None, :, None, None].expand(1, 3, 8, 8)
    assert find_reward("stain_hue").score(torch.cat([purple, -purple, plain(0.3)]), [""] * 3).tolist() == [1, -1, 0]
    area, count = find_reward("nucleus_area"), find_reward("cell_count")
    images = torch.cat([discs((8, 8)), discs((8, 8), (24, 24)), discs((6, 6), (6, 24), (24, 12))])
    assert count.score(images, [""] * 3).tolist() == [1, 2, 3]
    assert count.score(-images, [""] * 3).tolist() == [1, 2, 3]  # bright cells on a dark ground
    torch.testing.assert_close(area.score(images, [""] * 3), torch.tensor([1.0, 2.0, 3.0]) * 49 / 1024)
    assert area.score(plain(0.5), [""]).tolist() == count.score(plain(0.5), [""]).tolist() == [0]
    noise = torch.rand(1, 3, 32, 32) * 2 - 1
    size, small = find_reward("jpeg_incompressibility"), find_reward("jpeg_compressibility")
    assert size.score(noise, [""]) > 2 * size.score(discs((8, 8)), [""])
    assert small.score(noise, [""]) == -size.score(noise, [""])


def test_sums_and_minimum():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    one, other = (find_reward(name).score(images, [""] * 4) for name in ("brightness", "stain_hue"))
    mixed = find_reward("2e-1*brightness - stain_hue")
    torch.testing.assert_close(mixed.score(images, [""] * 4), 0.2 * one - other)
    assert mixed.differentiable and not find_reward("brightness + nucleus_area").differentiable
    torch.testing.assert_close(find_reward("-brightness").score(images, [""] * 4), -one)
    least = find_reward("min(brightness, stain_hue)").score(images, [""] * 4)
    torch.testing.assert_close(least, torch.minimum(one, other))


def test_similarity_is_the_cosine_of_the_dual_encoder(tiny_dual_encoder_dir):
    encoder = load_dual_encoder(str(tiny_dual_encoder_dir), "cpu")
    reward = find_reward(f"similarity:{tiny_dual_encoder_dir}")
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = ["a cell", "a nucleus", "a cell"]
    expected = (encoder.embed_images(list(pixels.numpy())) * encoder.embed_texts(prompts)).sum(dim=1)
    images = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).requires_grad_()
    found = reward.score(images, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert images.grad.abs().sum() > 0 and reward.differentiable and reward.sha256 == (encoder.sha256,)


def test_zero_shot_prefers_the_class_that_the_prompt_means(visbio_data):
    test = load_image_dataset(str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz"), "test")
    bank, rows = load_bank("bloodmnist"), [int(np.flatnonzero(test.labels == k)[0]) for k in range(8)]
    images = torch.stack([torch.as_tensor(test[row]["image"]).permute(2, 0, 1) / 127.5 - 1 for row in rows])
    own = [bank.heldout_captions(k)[0] for k in range(8)]
    reward = find_reward("zero_shot")
    right, wrong = reward.score(images, own), reward.score(images, own[1:] + own[:1])
    assert right.max() <= 0 and (right > wrong + 1).sum() >= 7
    assert reward.sha256 == (load_dual_encoder(str(default_model("visbio-align-blood"))).sha256,)


def test_classifier_gives_the_probability_of_the_class_that_is_named(tmp_path):
    names = {0: "monocyte", 1: "neutrophil", 2: "band neutrophil"}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, id2label=names, **shape)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path
    )
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    reward = find_reward(f"classifier:{tmp_path}")
    found = reward.score(images, ["a Monocyte", "one band neutrophil", "a neutrophil"])
    expected = model(images).logits.log_softmax(dim=1)[torch.arange(3), torch.tensor([0, 2, 1])]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="'a platelet' names no class of"):
        reward.score(images[:1], ["a platelet"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot use the classifier"):
        find_reward(f"classifier:{tmp_path / 'empty'}")


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """A module of rewards in the working folder, as a user would write it."""
    (tmp_path / "own_rewards.py").write_text(
        "import torch\n"
        "def fine(images, prompts): return [3, 4][: len(prompts)]\n"
        "def breaks(images, prompts): return images[len(prompts)]\n"
        "def nan(images, prompts): return torch.tensor([1.0, float('nan')])\n"
        "def short(images, prompts): return torch.ones(1)\n"
        "def words(images, prompts): return ['good', 'bad']\n"
    )
    monkeypatch.chdir(tmp_path)


def test_rewards_of_ones_own_are_checked(own_rewards):
    images = plain(0, 2)
    assert find_reward("own_rewards:fine").score(images, ["", ""]).tolist() == [3.0, 4.0]  # integers become floats
    for name, said in {
        "breaks": "own_rewards:breaks failed: IndexError",
        "nan": "own_rewards:nan gave 1 of 2 values that are not finite",
        "short": r"own_rewards:short gave shape \(1,\) for 2 images",
        "words": "own_rewards:words failed: ValueError",
    }.items():
        with pytest.raises(ValueError, match=said):
            find_reward(f"own_rewards:{name}").score(images, ["", ""])
    for spec in ("brightnes", "own_rewards:missing", "nothing:here", "", "brightness +", "0.5*"):
        with pytest.raises(ValueError, match="no reward .*: give one of brightness, .*module:function"):
            find_reward(spec)
