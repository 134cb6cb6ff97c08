"""The judge of images and prompts: what it learns, and that it falls to chance for shuffled prompts."""

import numpy as np
import pytest
import torch
from test_evaluation import NAMES, toy_images

from visbio_diffusers import load_bank
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation import alignment, features


@pytest.fixture(scope="module")
def judge():
    """Return a short-trained judge of the toy images, its text features and the plain captions."""
    toy = toy_images(320, 0)
    dataset = ImageDataset("toy", "train", toy.images, toy.labels, class_names=NAMES, bank="bloodmnist")
    encode = alignment.text_features()
    model = alignment.train_alignment(dataset, toy.images, encode, steps=60, seed=0, width=16, batch_size=64)
    return model, encode, alignment.plain_captions(dataset)


def test_text_features_do_not_depend_on_their_company():
    encode = alignment.text_features()
    texts = ["a monocyte", "a segmented neutrophil, Wright-Giemsa stain", "a monocyte"]
    together = encode(texts)
    assert together.dtype == np.float32 and (together[0] == together[2]).all()
    np.testing.assert_allclose(together[1], encode(texts[1:2])[0], rtol=1e-3, atol=1e-4)


def test_scores_of_matching_and_of_shuffled_prompts(judge):
    model, encode, captions = judge
    fresh = toy_images(160, 1)
    own = [captions[label] for label in fresh.labels]
    matched = alignment.alignment_scores(model, fresh.images, fresh.labels, own, captions, encode)
    assert matched["retrieval"]["value"] > 0.8
    assert matched["score"]["low"] > matched["mismatched"]["high"]
    assert -100 <= matched["score"]["low"] <= matched["score"]["value"] <= matched["score"]["high"] <= 100

    wrong = np.random.default_rng(0).permutation(fresh.labels)
    shuffled = alignment.alignment_scores(model, fresh.images, wrong, [captions[k] for k in wrong], captions, encode)
    assert shuffled["retrieval"]["low"] < 1 / 8 + 0.05 and shuffled["retrieval"]["value"] < 0.3


def test_held_out_words_are_understood_better_than_by_chance(judge):
    model, encode, captions = judge
    fresh, bank = toy_images(160, 2), load_bank("bloodmnist")
    prompts = [bank.heldout_captions(int(label))[0] for label in fresh.labels]
    entry = alignment.alignment_scores(model, fresh.images, fresh.labels, prompts, captions, encode)
    assert entry["retrieval"]["low"] > 1 / 8


def test_judge_survives_saving(judge, tmp_path):
    model, encode, captions = judge
    features.save(model, tmp_path / "clip", {"steps": 60})
    loaded, _ = features.load(tmp_path / "clip")
    toy = toy_images(16, 3)
    prompts = [captions[label] for label in toy.labels]
    scores = [
        alignment.alignment_scores(each, toy.images, toy.labels, prompts, captions, encode) for each in (model, loaded)
    ]
    assert scores[0] == scores[1]
    assert features.weights_hash(loaded) == features.weights_hash(model)
    assert loaded.project_texts(torch.zeros(1, 192)).norm().item() == pytest.approx(1)


def test_sets_without_a_bank_are_captioned_by_their_class_names():
    dataset = ImageDataset("mine", "train", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), class_names=("a", "b"))
    assert alignment.plain_captions(dataset) == ["a microscopy image of a", "a microscopy image of b"]
