"""The low-data regime: subsets, mixtures, and classifiers that profit from good images and not from wrong ones."""

import numpy as np
import pytest
from test_evaluation import NAMES, toy_images

from visbio_diffusers.evaluation import downstream
from visbio_diffusers.evaluation.images import Split


def test_few_of_each_are_as_many_of_every_class_and_repeatable():
    train = toy_images(160, 0)
    few = downstream.few_of_each(train, 3, seed=1)
    assert np.bincount(few.labels).tolist() == [3] * 8
    assert (few.images == downstream.few_of_each(train, 3, seed=1).images).all()
    assert (few.images != downstream.few_of_each(train, 3, seed=2).images).any()
    with pytest.raises(ValueError, match="class 0 has 20 images, not 21"):
        downstream.few_of_each(train, 21, seed=0)


@pytest.mark.parametrize(("num_real", "num_synthetic", "expected"), [(16, 40, 48 + 40), (40, 16, 40 + 16)])
def test_mixture_keeps_real_images_from_drowning(num_real, num_synthetic, expected):
    real, synthetic = toy_images(num_real, 0), toy_images(num_synthetic, 1)
    both = downstream.mixed(real, synthetic)
    assert len(both.labels) == len(both.images) == expected
    assert (both.images[-num_synthetic:] == synthetic.images).all()


def noisy(split):
    """Return the images in so much noise that a few do not teach what their classes are."""
    noise = np.random.default_rng(len(split.labels)).normal(0, 120, split.images.shape)
    return Split((split.images + noise).clip(0, 255).astype(np.uint8), split.labels)


def test_more_images_help_and_wrong_labels_harm():
    few, more, test = noisy(toy_images(8, 0)), noisy(toy_images(320, 1)), noisy(toy_images(160, 2))
    wrong = Split(more.images, np.roll(more.labels, 1))
    settings = {"num_classes": len(NAMES), "steps": 30, "seeds": [0, 1, 2], "device": "cpu"}
    alone, helped, harmed = (
        downstream.answers_after_training(split, test, **settings)
        for split in (few, downstream.mixed(few, more), downstream.mixed(few, wrong))
    )
    scores = [downstream.accuracy(right) for right in (helped, alone, harmed)]
    assert scores[0]["value"] > scores[1]["value"] > scores[2]["value"]
    assert downstream.gain(helped, alone)["low"] > 0 > downstream.gain(harmed, alone)["high"]
    assert all(score["low"] <= score["value"] <= score["high"] and len(score["per_seed"]) == 3 for score in scores)


def test_interval_of_a_gain_covers_the_truth():
    """Two classifiers that are right on 0.6 and 0.65 of all images, with seeds that differ; 95 of 100 are expected."""
    covered = 0
    for draw in range(100):
        rng = np.random.default_rng(draw)
        shares = np.array([[0.6], [0.65]])[:, None] + rng.normal(0, 0.02, (2, 4, 1))
        without, right = rng.random((2, 4, 300)) < shares
        entry = downstream.gain(right, without)
        covered += entry["low"] <= 0.05 <= entry["high"]
    assert 90 <= covered <= 100
