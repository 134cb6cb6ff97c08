"""Extractors of the user's own: what they see is what their networks would be given by their own processing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from visbio_diffusers.evaluation import features
from visbio_diffusers.evaluation.extractors import load_extractor


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """Return the folder of an untrained DINOv2 for images of 28 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    processing = {"crop_size": {"height": 28, "width": 28}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


def test_dinov2_from_a_folder(dino_folder):
    name, extractor = load_extractor(str(dino_folder))
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    found = features.features(extractor, images)
    net = Dinov2Model.from_pretrained(dino_folder).eval()
    inputs = (torch.tensor((images / 255 - MEAN) / STD)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = net(pixel_values=inputs).pooler_output.numpy()
    assert name == "tiny-dinov2" and found.shape == (3, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_images_are_resized_as_pillow_does(dino_folder):
    _, extractor = load_extractor(str(dino_folder))
    small = np.random.default_rng(0).integers(0, 256, (14, 14, 3)).astype(np.uint8)
    large = np.array(Image.fromarray(small).resize((28, 28), Image.Resampling.BICUBIC))
    from_small, from_large = (features.features(extractor, image[None]) for image in (small, large))
    assert np.abs(from_small - from_large).max() < 0.02 * np.abs(from_large).max()
    grey = features.features(extractor, np.full((1, 28, 28, 1), 90, np.uint8))
    np.testing.assert_allclose(grey, features.features(extractor, np.full((1, 28, 28, 3), 90, np.uint8)), rtol=1e-5)


class _Inception(torch.nn.Module):
    """Stands in for the published file: the same call, another network."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8 and return_features
        return images.float().mean(dim=(2, 3))


def test_torchscript_is_given_bytes(tmp_path):
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(_Inception()).save(str(file))
    name, extractor = load_extractor(str(file))
    images = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3)).astype(np.uint8)
    assert name == "inception-2015-12-05"
    np.testing.assert_allclose(features.features(extractor, images), images.mean(axis=(1, 2)), rtol=1e-5)


def test_what_is_no_extractor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no extractor"):
        load_extractor(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="holds no vision model"):
        load_extractor(str(tmp_path))
    file = tmp_path / "weights.pt"
    torch.save({"pickled": 1}, file)
    with pytest.raises(ValueError, match="is no TorchScript file"):
        load_extractor(str(file))
