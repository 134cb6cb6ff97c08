"""Photographs with masks: where they lie, how they are cut, that captions are true of the masks, what is refused."""

import logging
import shutil
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.measure import label

from visbio_diffusers import load_image_dataset
from visbio_diffusers.data import cellpose, load_cellpose
from visbio_diffusers.data.cellpose import Tiling, find_pairs, is_cellpose
from visbio_diffusers.data.objects import NUMBERS
from visbio_diffusers.image_sets import ImageSetsConfig, load_image_sets


def _masks(height=64, width=96):
    """Two tiles of 32 pixels with objects: one of 16 x 16 at the upper left, two of 8 x 12 to the right of it."""
    masks = np.zeros((height, width), np.uint16)
    masks[4:20, 4:20] = 7
    masks[2:10, 36:48] = 300
    masks[20:28, 40:52] = 2
    return masks


def _save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, compression="zlib" if "_masks" in path.name else None)
    else:
        Image.fromarray(pixels).save(path)


def _write(image, masks_path, masks, bits=8):
    shown = (masks > 0) * 150 + 40
    _save(image, (shown * 257).astype(np.uint16) if bits == 16 else shown.astype(np.uint8))
    _save(masks_path, masks)


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        name = f"{number:03d}"
        suffix = "tif" if number % 3 == 0 else "png"
        paths = tmp_path / f"{name}_img.{suffix}", tmp_path / f"{name}_masks.{suffix}"
        _write(*paths, _masks(), bits=16 if number % 2 else 8)
    return tmp_path


def _all(folder, size=32, **options):
    return [load_cellpose(str(folder), split, size, **options) for split in ("train", "val", "test")]


def test_every_photograph_is_in_one_split_and_format_and_bits_make_no_difference(folder):
    train, val, test = sets = _all(folder)
    assert sum(map(len, sets)) == 2 * 40 and len(train) > len(val) > 0 < len(test)
    tiles = load_image_dataset(str(folder), "train", tile_size=32, resolution=16)
    assert tiles.images.shape == (len(train), 16, 16, 3) and set(tiles.labels) == {0}
    expected = ["fluorescence image, one large nucleus, spaced", "fluorescence image, two medium-sized nuclei, spaced"]
    assert tiles.captions == expected * (len(train) // 2)
    assert all(np.array_equal(image, tiles.images[place % 2]) for place, image in enumerate(tiles.images))
    assert tiles.images[0, 4, 4, 0] == 255 and tiles.images[0, 14, 14, 0] == 0
    assert tiles.masks.shape == (len(train), 16, 16) and tiles[1]["mask"].max() == 2


@pytest.mark.parametrize(
    ("image", "masks"),
    [
        ("{}_img.png", "{}_masks.tif"),
        ("{}.tif", "{}_cp_masks.png"),
        ("{}_img.ome.tif", "{}_img_cp_masks.tif"),
        ("{0}/{0}_img.png", "{0}/{0}_masks.png"),
        ("{}/img.png", "{}/masks/img_cp_masks.png"),
        ("images/{}.png", "masks/{}.png"),
        ("plate/images/{}.tif", "plate/masks/{}_masks.png"),
        ("{}.png", "masks/{}_cp_masks.png"),
    ],
)
def test_layouts(tmp_path, image, masks):
    for number in range(30):
        _write(tmp_path / image.format(number), tmp_path / masks.format(number), _masks())
        for product in ("_flows.tif", "_cp_output_cp_masks.png", "_outlines_cp_masks.png", "_dP_cp_masks.tif"):
            _save((tmp_path / image.format(number)).with_name(f"{number}{product}"), np.zeros((9, 9), np.uint8))
    (tmp_path / "._0_img.png").write_bytes(b"of another system")
    assert is_cellpose(tmp_path)
    assert sum(map(len, _all(tmp_path))) == 60


def test_image_folders_are_no_photographs_with_masks(tmp_path):
    assert not is_cellpose(tmp_path / "absent")
    for name in ("masks/a.png", "no_masks/b.png", "c_img.png"):
        _save(tmp_path / name, np.zeros((9, 9), np.uint8))
    assert not is_cellpose(tmp_path)
    (tmp_path / "c_img_seg.npy").touch()
    assert is_cellpose(tmp_path)
    (tmp_path / "metadata.jsonl").touch()
    assert not is_cellpose(tmp_path)


@pytest.mark.parametrize("inside", ["{}_img.png {}_masks.png", "images/{}.png masks/{}.png"])
def test_folders_of_splits_are_the_splits(tmp_path, caplog, inside):
    image, masks = inside.split()
    for split, count in (("train", 3), ("test", 2), ("validation", 1)):
        for number in range(count):
            _write(tmp_path / split / image.format(number), tmp_path / split / masks.format(number), _masks())
    _write(tmp_path / "x_img.png", tmp_path / "x_masks.png", _masks())
    assert list(map(len, _all(tmp_path))) == [6, 2, 4]
    assert "1 outside the folders of its splits are left out" in caplog.text and "x_img.png" in caplog.text
    with pytest.raises(ValueError, match="has no split 'extra': it has test, train, validation"):
        load_cellpose(str(tmp_path), "extra", 32)


def test_tiles_cover_what_is_said(tmp_path, caplog):
    assert Tiling(32).starts(100) == [0, 32, 64] and Tiling(32).starts(31) == []
    assert Tiling(32, 0.5).starts(100) == [0, 16, 32, 48, 64, 68] and Tiling(32, 0.5).starts(32) == [0]
    masks = np.ones((80, 100), np.uint16)
    _write(tmp_path / "a_img.png", tmp_path / "a_masks.png", masks)
    split = {0: "test", 1: "val"}.get(zlib.crc32(b"a") % 10, "train")
    caplog.set_level(logging.INFO, "visbio_diffusers")
    assert len(load_cellpose(str(tmp_path), split, 32)) == 2 * 3
    assert "23.2 % lie beyond the last whole tiles" in caplog.text
    assert len(load_cellpose(str(tmp_path), split, 32, tile_overlap=0.25)) == 3 * 4
    assert len(load_cellpose(str(tmp_path), split, 32, tile_overlap=0.01)) == 3 * 4
    for wrong in ({"size": 0}, {"size": 32, "overlap": 0.95}, {"size": 32, "min_object_area": -1.0}):
        with pytest.raises(ValueError, match="tile"):
            Tiling(**wrong)


def test_settings_of_a_training_reach_captions_and_masks(folder):
    shutil.rmtree(folder, ignore_errors=True)
    planes = np.stack([90 * (_masks() > 0), 40 * (_masks() > 0), _masks() * 0]).astype(np.uint16)
    size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    for split in ("train", "test"):
        _save(folder / split / "a_masks.tif", _masks())
        facts = {"axes": "CYX", "Channel": {"Name": ["x", "y", "z"]}, **size}
        tifffile.imwrite(folder / split / "a.ome.tif", planes, photometric="minisblack", metadata=facts)
    settings = ImageSetsConfig(
        output_dir="runs", dataset_name=[str(folder)], tile_size=32, resolution=16, tile_overlap=0.5,
        min_object_area=0.09, object_name="cell", channel_names=["nucleus", "cytoplasm", "none"],
    )  # fmt: skip
    (tiles,) = load_image_sets(settings, 3)
    kind = "fluorescence image of nucleus in blue and cytoplasm in green"
    assert tiles.captions[0] == f"{kind}, one large cell of 9 um, spaced, 1 um per pixel"
    assert tiles.images[0, 4, 4].tolist() == [0, 255, 255]
    assert all(masks.any() and np.bincount(masks.ravel())[1:].min() >= 0.09 * 16 * 16 for masks in tiles.masks)
    picked = tiles.select(np.array([1])).formatted(8, 1)
    assert picked.masks.shape == (1, 8, 8) and np.array_equal(picked[0]["mask"], tiles.masks[1][1::2, 1::2])
    _save(folder / "train" / "b_img.png", _masks().astype(np.uint8))
    _save(folder / "train" / "b_masks.png", _masks())
    with pytest.raises(ValueError, match=r"b_img.png has not 3 channels \(nucleus, cytoplasm, none\) but 1"):
        load_image_sets(settings, 3)


def _refused(folder, message, split="train", size=32):
    with pytest.raises(ValueError, match=message) as caught:
        load_cellpose(str(folder), split, size)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_cut_is_named(folder):
    _refused(folder, "no split 'extra': it has train, val, test", "extra")
    _refused(folder, "all photographs of .* are smaller than a tile of 80: lower tile_size", size=80)
    (path,) = (pair.masks for pair in find_pairs(folder) if pair.name == "001")
    for wrong, message in (
        (np.zeros((5, 5), np.uint16), r"001_masks.png has \(5, 5\) pixels, its photograph \(64, 96\)"),
        (np.zeros((64, 96, 3), np.uint8), "001_masks.png has 3 channels: masks are grey"),
    ):
        Image.fromarray(wrong).save(path)
        _refused(folder, message)
    path.write_bytes(path.read_bytes()[:60])
    _refused(folder, r"cannot read .*001_masks.png \(.*\): replace or remove it")
    _save(path, _masks())
    image = folder / "001_img.png"
    image.rename(folder / "kept.png")
    _refused(folder, r"001_masks.png has no photograph 001.\* or 001_img.\*")
    (folder / "kept.png").rename(image)
    for double in ("001_masks.tif", "001_img.tif", "001_cp_masks.png"):
        _save(folder / double, _masks())
        _refused(folder, "001_(img|masks|cp_masks).(png|tif) and 001_(img|masks).(png|tif) are both for the same")
        (folder / double).unlink()
    tifffile.imwrite(folder / "002_img.tif", np.full((64, 96), np.nan, np.float32))
    (folder / "002_img.png").unlink()
    _refused(folder, "002_img.tif has values that are not finite")


def test_photographs_without_masks(folder, caplog):
    (folder / "001_masks.png").unlink()
    (folder / "preview.png").touch()  # no NAME_img among such
    assert len(find_pairs(folder)) == 39
    assert "1 without masks are left out, such as" in caplog.text and "001_img.png" in caplog.text
    for name in ("001_seg.npy", "001_img_seg.npy"):
        (folder / name).touch()
        _refused(folder, rf"the masks of .*001_img.png are in {name} alone.*File > Save masks as PNG/tif.*--save_tif")
        (folder / name).unlink()
    for path in folder.glob("*_masks.*"):
        path.unlink()
    _refused(folder, "no photograph in .* has masks NAME_masks.png or .tif beside it: save masks in Cellpose")


def test_small_photographs_are_left_out_by_name(folder, caplog):
    names = [pair.name for pair in cellpose.choose_split(find_pairs(folder), "train", "")]
    count = len(load_cellpose(str(folder), "train", 32))
    for kind in ("img", "masks"):
        (path,) = folder.glob(f"{names[0]}_{kind}.*")
        _save(path, np.ones((20, 200), np.uint8))
    assert len(load_cellpose(str(folder), "train", 32)) == count - 2
    assert caplog.text.count(f"{names[0]}_img") == 1 and "smaller than a tile of 32 pixels" in caplog.text


def test_empty_masks_are_refused(folder):
    for path in folder.glob("*_masks.*"):
        _save(path, np.zeros((64, 96), np.uint16))
    _refused(
        folder, "no tile of 32 pixels in .* shows an object of 1.00% of it or more: look whether its masks are empty"
    )


def _number(caption):
    word = caption.split(", ")[1].split()[0]
    return NUMBERS.index(word) if word in NUMBERS else int(word)


@pytest.mark.parametrize("split", ["test", "val", pytest.param("train", marks=pytest.mark.slow)])
def test_captions_are_true_of_all_real_masks(visbio_data, split):
    folder = visbio_data / "dsb2018_cellpose"
    tiles = load_cellpose(str(folder), split, 64)
    names = sorted(path.name[:3] for path in folder.glob("*_masks.png"))
    places = {"test": [0], "val": [1], "train": range(2, 10)}[split]
    row = 0
    for name in names:
        if zlib.crc32(name.encode()) % 10 not in places:
            continue
        raw = np.asarray(Image.open(folder / f"{name}_masks.png"))
        for top in range(0, raw.shape[0] - 63, 64):
            for left in range(0, raw.shape[1] - 63, 64):
                window = raw[top : top + 64, left : left + 64]
                numbers, areas = np.unique(window, return_counts=True)
                kept = numbers[(numbers > 0) & (areas >= 0.01 * 64 * 64)]
                if len(kept):
                    found = tiles.masks[row]
                    assert _number(tiles.captions[row]) == found.max() == len(kept)
                    assert len(np.unique(found)) == len(kept) + (found == 0).any()
                    assert np.array_equal(
                        np.concatenate([[0], kept])[found], np.where(np.isin(window, kept), window, 0)
                    )
                    assert label(found, background=0, connectivity=2).max() >= len(kept)  # pieces are no fewer
                    row += 1
    assert row == len(tiles)


def test_real_nuclei(visbio_data):
    tiles = load_image_dataset(str(visbio_data / "dsb2018_cellpose"), "test", resolution=28)
    shares = np.bincount(tiles.labels) / len(tiles)
    assert len(tiles) > 1000 and tiles.images.shape[1:] == (28, 28, 3) and tiles.masks.shape[1:] == (28, 28)
    assert shares[0] > 0.7 and shares[1] > 0.05 and shares[2] > 0.01
    colour = np.ptp(tiles.images.astype(int), axis=3).mean(axis=(1, 2))
    assert colour[tiles.labels == 1].min() > 0 == colour[tiles.labels != 1].max()
    assert len(set(tiles.captions)) > 50 and "fluorescence image, one small nucleus, sparse" in tiles.captions
    assert sum(len(np.unique(masks)) - 1 for masks in tiles.masks) >= 0.999 * sum(map(_number, tiles.captions))
