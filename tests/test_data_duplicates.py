"""Duplicates: the hash against a cosine transform of another library, the search against all pairs, real cells."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from visbio_diffusers.data.duplicates import Fingerprints, close_pairs, distance, perceptual_hash, pixel_digest


def bits(hashes: np.ndarray) -> np.ndarray:
    return np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)


@pytest.fixture(scope="module")
def cells(visbio_data):
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as file:
        return {f"{split}_images": file[f"{split}_images"] for split in ("train", "val", "test")}


def test_hash_is_that_of_a_cosine_transform():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    low = dctn(images @ np.array([0.299, 0.587, 0.114]), axes=(1, 2), norm=None)[:, 1:9, 1:9].reshape(20, 64)
    assert np.array_equal(bits(perceptual_hash(images)), low > np.median(low, axis=1, keepdims=True))


def test_reduction_is_that_of_pillow(cells):
    large = np.stack([np.asarray(Image.fromarray(cell).resize((90, 70), 3)) for cell in cells["val_images"][:50]])
    small = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), 2)) for image in large])
    assert distance(perceptual_hash(large), perceptual_hash(small)).max() <= 4


def test_search_finds_what_a_comparison_of_all_pairs_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)
    for _ in range(4):  # the same with a bit or two changed, here and there
        hashes = np.concatenate([hashes, hashes ^ np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)])
    found = [(a, b) for pairs in close_pairs(hashes, 3) for a, b in zip(*map(np.ndarray.tolist, pairs), strict=True)]
    unpacked = bits(hashes)
    differ = (unpacked[:, None] != unpacked[None]).sum(axis=2)
    wanted = set(zip(*np.nonzero(np.triu(differ <= 3, 1)), strict=True))
    assert len(found) == len(set(found)) == len(wanted) > 1000
    assert {tuple(sorted(pair)) for pair in found} == wanted


def test_digest_tells_shapes_and_pixels_apart():
    image = np.zeros((2, 8, 3), np.uint8)
    other = image.copy()
    other[1, 7, 2] = 1
    assert len({pixel_digest(image), pixel_digest(other), pixel_digest(image.reshape(4, 4, 3))}) == 3
    assert pixel_digest(image) == pixel_digest(np.asfortranarray(image))


def test_real_cells_in_disguise_are_found_and_others_not(cells):
    """The test cells once more as JPEG, brighter or noisier: each finds its own and nothing else."""
    images = cells["test_images"]
    disguised = images[:300].copy()
    for index in range(100):
        file = io.BytesIO()
        Image.fromarray(disguised[index]).save(file, "JPEG", quality=75)
        disguised[index] = np.asarray(Image.open(file))
    disguised[100:200] = np.clip(disguised[100:200].astype(int) + 12, 0, 255)
    noise = np.random.default_rng(0).normal(0, 4, disguised[200:].shape)
    disguised[200:] = np.clip(disguised[200:] + noise, 0, 255)
    both = np.concatenate([images, disguised])
    prints = Fingerprints()
    for start in range(0, len(both), 1000):
        prints.add(both[start : start + 1000])
    groups = [group.tolist() for group in prints.near_groups(lambda index: both[index])]
    assert groups == [[index, len(images) + index] for index in range(300)]


def test_same_pixels_in_real_splits(cells):
    prints = Fingerprints()
    for split in ("train", "val", "test"):
        prints.add(cells[f"{split}_images"])
    groups = prints.exact_groups()
    everything = np.concatenate([cells[f"{split}_images"] for split in ("train", "val", "test")])
    assert len(groups) == 17 and all(len(group) == 2 for group in groups)
    assert all(np.array_equal(everything[first], everything[second]) for first, second in groups)


def test_flat_images_are_alike_only_if_equal():
    pink = np.full((3, 8, 8, 3), (250, 120, 180), np.uint8)
    pink[2, 0, 0, 0] = 251
    prints = Fingerprints()
    prints.add(pink)
    assert [group.tolist() for group in prints.exact_groups()] == [[0, 1]]
    assert prints.near_groups(lambda index: pink[index]) == []
