"""Captions for contrastive learning: what each means, and which images it fits."""

import numpy as np
import pytest
import torch

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import ImageDataset, training_batches
from visbio_diffusers.data.pairs import UNSAID, CaptionPairs, matching_pairs


def make_set(labels, **facts):
    images = np.zeros((len(labels or facts["captions"]), 4, 4, 3), np.uint8)
    return ImageDataset("x", "train", images, None if labels is None else np.array(labels), **facts)


def test_matching_by_hand():
    images = torch.tensor([[0, UNSAID], [0, 5], [0, 6], [1, UNSAID]])
    captions = torch.tensor([[0, UNSAID], [0, 5], [1, UNSAID]])
    expected = [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert matching_pairs(images, captions).int().tolist() == expected


def test_captions_of_classes_and_of_subtypes():
    names = load_bank("bloodmnist").class_names
    neutrophil, basophil = names.index("neutrophil"), names.index("basophil")
    first = make_set([neutrophil, neutrophil, basophil], bank="bloodmnist", subtypes=["band neutrophil", None, None])
    second = make_set([neutrophil, basophil], bank="bloodmnist")
    pairs = CaptionPairs([first, second], 40, seed=0)
    rng = np.random.default_rng(0)
    drawn = [pairs.caption(0, {"index": 0}, rng) for _ in range(200)]
    said = pairs.of_captions(drawn)
    band, any_neutrophil, a_basophil = pairs.of_images([(0, 0), (0, 1), (0, 2)])
    assert 60 < (said[:, 1] == band[1]).sum() < 140 and band[1] != UNSAID == any_neutrophil[1]
    assert {text for text, meaning in zip(drawn, said) if meaning[1] == band[1]} <= set(
        pairs.pools[tuple(band.tolist())]
    )
    assert torch.equal(pairs.of_images([(1, 0), (1, 1)]), torch.stack([any_neutrophil, a_basophil]))  # one bank
    fits = matching_pairs(torch.stack([band, any_neutrophil, a_basophil]), said)
    assert fits[:2].all() and not fits[2].any()
    specific = " ".join(pairs.pools[tuple(band.tolist())])
    assert "band" in specific and "segmented" not in " ".join(
        text for text in pairs.pools[band[0].item(), UNSAID] if text.startswith("a segmented neutrophil")
    )


def test_captions_of_ones_own_fit_images_with_the_very_same_one():
    own = make_set(None, captions=["two cells", "one cell", "two cells"])
    named = make_set([0, 1], class_names=("round", "long"))
    pairs = CaptionPairs([own, named], 8, seed=0)
    images = pairs.of_images([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
    rng = np.random.default_rng(0)
    captions = [pairs.caption(*source, rng) for source in ((0, {"index": 1}), (1, {"index": 1}))]
    assert captions == ["one cell", "a microscopy image of long"]
    assert matching_pairs(images, pairs.of_captions(captions)).int().tolist() == [
        [0, 0],
        [1, 0],
        [0, 0],
        [0, 0],
        [0, 1],
    ]
    again = CaptionPairs([named, make_set([1, 0], class_names=("long", "round"))], 8, seed=0)
    assert torch.equal(again.of_images([(0, 0), (0, 1)]), again.of_images([(1, 0), (1, 1)]))  # by name, not by number
    with pytest.raises(ValueError, match="x has no captions: choose with --caption_column"):
        CaptionPairs([make_set([0])], 8, seed=0)


def test_batches_say_which_images_they_hold():
    dataset = make_set([0, 1, 2], bank="bloodmnist")
    pairs = CaptionPairs([dataset], 4, seed=0)
    batch = next(training_batches([dataset], None, pairs.caption, 6, seed=0))
    assert [int(dataset.labels[index]) for _, index in batch["sources"]] == batch["labels"]
    matching = matching_pairs(pairs.of_images(batch["sources"]), pairs.of_captions(batch["captions"]))
    assert matching.diagonal().all()
    labels = torch.tensor(batch["labels"])
    assert torch.equal(matching, labels[:, None] == labels)
