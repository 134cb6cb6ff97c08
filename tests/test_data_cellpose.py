"""Tiles of photographs with masks: what is cut, what is measured, what is said of it, what is refused."""

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers import load_image_dataset
from visbio_diffusers.data import load_cellpose
from visbio_diffusers.data.cellpose import Content, cut_tiles, describe, find_pairs, measure, normalise


def _masks(height=64, width=96):
    """Two tiles of 32 pixels with objects: one of 16 x 16 at the upper left, two of 8 x 12 to the right of it."""
    masks = np.zeros((height, width), np.uint16)
    masks[4:20, 4:20] = 7
    masks[2:10, 36:48] = 300
    masks[20:28, 40:52] = 2
    return masks


def _write(folder, name, masks, bits=8, bright=False):
    shown = (masks > 0) * 150 + 40
    shown = 230 - shown if bright else shown
    pixels = (shown * 257).astype(np.uint16) if bits == 16 else shown.astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}_img.png")
    Image.fromarray(masks).save(folder / f"{name}_masks.png")


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        _write(tmp_path, f"{number:03d}", _masks(), bits=16 if number % 2 else 8)
    return tmp_path


def test_every_photograph_is_in_one_split_and_tiles_hold_what_was_cut(folder):
    sizes = {split: len(load_cellpose(str(folder), split, 32)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 2 * 40 and sizes["train"] > sizes["val"] > 0 < sizes["test"]
    tiles = load_image_dataset(str(folder), "train", tile_size=32, resolution=16)
    assert tiles.images.shape == (sizes["train"], 16, 16, 3) and set(tiles.labels) == {0}
    expected = ["fluorescence image, one large nucleus, spaced", "fluorescence image, two medium-sized nuclei, spaced"]
    assert tiles.captions == expected * (sizes["train"] // 2)
    assert tiles.images[0, 4, 4, 0] == 255 and tiles.images[0, 14, 14, 0] == 0


def test_bits_make_no_difference(tmp_path):
    for name, bits in (("a", 8), ("b", 16)):
        _write(tmp_path, name, _masks(), bits)
    eight, sixteen = (cut_tiles(pair, 32, 32) for pair in find_pairs(tmp_path))
    assert len(eight) == len(sixteen) == 2
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(eight, sixteen, strict=True))


def test_transparency_makes_no_difference(tmp_path):
    _write(tmp_path, "plain", _masks())
    plain = cut_tiles(find_pairs(tmp_path)[0], 32, 32)
    Image.open(tmp_path / "plain_img.png").convert("LA").save(tmp_path / "plain_img.png")
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(plain, cut_tiles(find_pairs(tmp_path)[0], 32, 32)))


def test_kinds_of_photographs(tmp_path):
    _write(tmp_path, "bright", _masks(), bright=True)
    assert cut_tiles(find_pairs(tmp_path)[0], 32, 32)[0][1].stain == "bright field"
    purple = np.full((8, 8, 3), (150, 90, 170), np.uint8)
    assert normalise(purple)[1] == "stained tissue" and np.array_equal(normalise(purple)[0], purple)


def test_measures_by_hand():
    found = measure(_masks()[:32, 32:64], "fluorescence")
    assert found.count == 2 and found.covered == 2 * 96 / 1024
    assert found.diameter == pytest.approx(2 * np.sqrt(96 / np.pi) / 32)
    speck = np.zeros((32, 32), int)
    speck[0, :10] = 1  # below 1 % of the tile
    assert measure(speck, "fluorescence").count == 0


def test_captions_say_what_was_measured():
    assert describe(Content("stained tissue", 1, 0.5, 0.2)) == "image of stained tissue, one large nucleus, spaced"
    assert describe(Content("bright field", 14, 0.1, 0.5)) == "bright-field image, many small nuclei, crowded"


def test_what_cannot_be_cut_is_named(folder):
    with pytest.raises(ValueError, match="no split 'extra': it has train, val, test"):
        load_cellpose(str(folder), "extra", 32)
    with pytest.raises(ValueError, match=r"000_img.png has \(64, 96\) pixels, less than a tile of 80"):
        load_cellpose(str(folder), "train", 80)
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(folder / "000_masks.png")
    with pytest.raises(ValueError, match=r"000_masks.png has \(5, 5\) pixels, its photograph \(64, 96\)"):
        cut_tiles(find_pairs(folder)[0], 32, 32)
    Image.new("RGB", (96, 64)).save(folder / "000_masks.png")
    with pytest.raises(ValueError, match=r"000_masks.png is a colour image \(mode RGB\): masks are grey"):
        cut_tiles(find_pairs(folder)[0], 32, 32)
    (folder / "000_img.png").unlink()
    with pytest.raises(ValueError, match="000_masks.png has no photograph 000_img"):
        load_cellpose(str(folder), "train", 32)


def test_real_nuclei(visbio_data):
    tiles = load_image_dataset(str(visbio_data / "dsb2018_cellpose"), "test", resolution=28)
    shares = np.bincount(tiles.labels) / len(tiles)
    assert len(tiles) > 1000 and tiles.images.shape[1:] == (28, 28, 3)
    assert shares[0] > 0.7 and shares[1] > 0.05 and shares[2] > 0.01
    colour = np.ptp(tiles.images.astype(int), axis=3).mean(axis=(1, 2))
    assert colour[tiles.labels == 1].min() > 0 == colour[tiles.labels != 1].max()
    assert len(set(tiles.captions)) > 50 and "fluorescence image, one small nucleus, sparse" in tiles.captions
