"""The dual encoder: embeds, calibration, what is unfamiliar, zero-shot classes, and folders that cannot be loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, VisionTextDualEncoderModel

from visbio_diffusers import load_bank
from visbio_diffusers.alignment import calibrate, caption_ensembles, classify, load_dual_encoder, measures
from visbio_diffusers.alignment.dual_encoder import familiarise, write_calibration


@pytest.fixture(scope="module")
def encoder(tiny_dual_encoder_dir):
    return load_dual_encoder(str(tiny_dual_encoder_dir), "cpu")


def photographs(n, side=8, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def test_embeds_are_those_of_transformers(encoder, tiny_dual_encoder_dir):
    images, texts = photographs(3), ["a cell", "a longer text of a cell"]
    model = VisionTextDualEncoderModel.from_pretrained(tiny_dual_encoder_dir).eval()
    processor = AutoProcessor.from_pretrained(tiny_dual_encoder_dir)
    out = model(**processor(text=texts, images=images, padding=True, return_tensors="pt"))
    torch.testing.assert_close(encoder.embed_images(images), out.image_embeds)
    torch.testing.assert_close(encoder.embed_texts(texts), out.text_embeds)
    assert encoder.calibration.scale == pytest.approx(model.logit_scale.exp().item())


def test_images_of_any_size_and_many_of_them(encoder):
    images = photographs(300)
    torch.testing.assert_close(encoder.embed_images(images)[299:], encoder.embed_images(images[299:]))
    wide = Image.fromarray(np.concatenate([photographs(1, 40)[0]] * 3, axis=1))
    assert encoder.embed_images([wide]).shape == (1, 512)


def test_long_texts_are_cut(encoder):
    text = "a cell " * 200
    torch.testing.assert_close(encoder.embed_texts([text]), encoder.embed_texts([text[:300]]))


def test_calibration_of_logits_made_too_small_and_too_large():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    for factor in (0.05, 20.0):
        found = calibrate(logits * factor, labels)
        assert found.scale * factor == pytest.approx(1.0, rel=0.05)
        assert (logits * factor).max(dim=1).values.lt(found.threshold).float().mean() == pytest.approx(0.01, abs=1e-3)


def test_features_of_other_things_are_unfamiliar():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    centres = 10 * torch.randn(3, 6, generator=generator)

    def draw(n, seed):
        own = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (n,), generator=own)
        return centres[labels] + torch.randn(n, 6, generator=own) @ mixing, labels

    (train, labels), (validation, _), (test, _) = draw(4000, 1), draw(2000, 2), draw(2000, 3)
    found = familiarise(train, labels * 2, validation)  # classes need not be numbered without gaps
    expected = torch.distributions.Chi2(6.0)  # of the squared distance to the own class
    assert found.distances(test).mean() == pytest.approx(6.0, abs=0.4)
    assert found.distances(test).gt(found.limit).float().mean() == pytest.approx(0.01, abs=0.006)
    assert expected.log_prob(torch.tensor(found.limit)) < -4
    assert (found.distances(centres.mean(dim=0) + 40 * torch.ones(50, 6)) > found.limit).all()


def test_calibration_is_kept_in_the_folder(encoder, tiny_dual_encoder_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_dual_encoder_dir, folder)
    features = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 2
    classes = encoder.embed_texts(["a cell", "a nucleus"])
    write_calibration(folder, encoder, "cells", (features, labels), (features, labels, classes))
    loaded = load_dual_encoder(str(folder), "cpu")
    record = json.loads((folder / "calibration.json").read_text())
    assert record["dataset"] == "cells" and record["n"] == 60
    assert loaded.calibration.threshold == record["threshold"] and loaded.familiar.limit == record["limit"]
    assert loaded.is_familiar(features).sum() == 59 and not loaded.is_familiar(features + 100).any()
    assert encoder.is_familiar(features + 100).all()  # nothing was fitted


def test_classes_are_mean_directions_of_their_captions(encoder):
    embeds = encoder.embed_images(photographs(4))
    captions = [["a cell", "one cell"], ["a nucleus"]]
    rows = encoder.embed_texts(["a cell", "one cell", "a nucleus"])
    first = torch.nn.functional.normalize(rows[0] + rows[1], dim=0)
    torch.testing.assert_close(classify(encoder, embeds, captions), embeds @ torch.stack([first, rows[2]]).T)


def test_ensembles_of_a_bank():
    bank = load_bank("bloodmnist")
    classes, subtypes = caption_ensembles(bank), caption_ensembles(bank, subtypes=True, size=8)
    assert tuple(classes) == bank.class_names and len(subtypes) == 11
    assert classes["monocyte"][0] == "a microscopy image of a monocyte" and len(set(classes["monocyte"])) == 64
    assert all(len(each) == 8 for each in subtypes.values()) and "neutrophil" not in subtypes
    heldout = {text for k in range(8) for text in bank.heldout_captions(k)}
    assert not heldout & {text for each in classes.values() for text in each}


def test_measures_by_hand(encoder):
    cosines = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 1, 0])
    assert measures.right(cosines, labels)["value"] == 0.75
    encoder = type(encoder)(encoder.model, encoder.processor)
    encoder.calibration = encoder.calibration._replace(scale=1e6)
    assert measures.calibration_error(encoder, cosines, labels) == pytest.approx(0.25)  # all sure, one wrong
    pixel_values = torch.stack([torch.full((3, 8, 8), value) for value in (-0.6, 0.6)])
    signs = torch.tensor([[-1.0, 1.0]])
    answer = measures.robustness(lambda images: images.mean(dim=(1, 2, 3))[:, None] * signs, pixel_values, labels[:2])
    assert {entry["value"] for entry in answer.values()} == {1.0} and len(answer) == 7


def test_what_cannot_be_loaded_is_told_in_one_line(tiny_dual_encoder_dir, tiny_pipeline_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no alignment model /gone/model: give its folder, or a Hub id"):
        load_dual_encoder("/gone/model")
    (tmp_path / "empty").mkdir()
    for change, message in (
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot load the alignment model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load the alignment model"),
        (lambda folder: (folder / "calibration.json").write_text("{}"), "cannot load the alignment model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load the alignment model"),
    ):
        folder = tmp_path / "model"
        shutil.copytree(tiny_dual_encoder_dir, folder)
        change(folder)
        with pytest.raises(ValueError, match=message) as error:
            load_dual_encoder(str(folder))
        assert "\n" not in str(error.value)
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="it is a bert, and no vision-text-dual-encoder"):
        load_dual_encoder(str(tiny_pipeline_dir / "text_encoder"))
    with pytest.raises(ValueError, match="no device 'cuda:7'"):
        load_dual_encoder(str(tiny_dual_encoder_dir), "cuda:7")
