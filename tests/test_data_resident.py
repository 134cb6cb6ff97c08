"""Images and captions on the device that trains are those of the ordinary stream."""

from itertools import islice

import numpy as np
import pytest
import torch

from visbio_diffusers.data import ImageDataset, training_batches
from visbio_diffusers.data.resident import ResidentImages


def make_set(num: int, side: int = 6) -> ImageDataset:
    images = np.random.default_rng(num).integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    return ImageDataset(f"set{num}", "train", images, np.arange(num), [f"caption {i}" for i in range(num)])


def own_caption(dataset_index: int, item: dict, rng: np.random.Generator) -> str:
    return f"{dataset_index} {item['caption']} {rng.integers(100)}"


@pytest.mark.parametrize("random_flip", ["none", "horizontal", "dihedral"])
def test_batches_are_those_of_the_ordinary_stream_bit_for_bit(random_flip):
    sets = [make_set(40), make_set(30)]
    arguments = sets, [0.7, 0.3], own_caption, 32, 5
    options = {"start": 2, "rank": 1, "world_size": 2, "random_flip": random_flip}
    ordinary = islice(training_batches(*arguments, **options), 3)
    undecoded = islice(training_batches(*arguments, **options, decode=False), 3)
    resident = ResidentImages(sets, torch.device("cpu"), random_flip)
    for one, other in zip(ordinary, undecoded, strict=True):
        assert (one["captions"], one["sources"]) == (other["captions"], other["sources"])
        assert torch.equal(one["pixel_values"], resident(other["sources"], other["orientations"]))


def test_images_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 6, 3\) and \(7, 7, 3\) do not fit together: give a resolution"):
        ResidentImages([make_set(3), make_set(4, side=7)], torch.device("cpu"))
