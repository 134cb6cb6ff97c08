"""MedMNIST: the table, and npz files good and bad."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import load_image_dataset, npz
from visbio_diffusers.data.medmnist import MEDMNIST, PBC_SUBTYPES


def arrays(num: int = 6, classes: int = 2, side: int = 28, channels: int = 0) -> dict[str, np.ndarray]:
    """Return train and test arrays in MedMNIST's format."""
    rng = np.random.default_rng(0)
    shape = (num, side, side, channels) if channels else (num, side, side)
    labels = (np.arange(num) % classes).astype(np.uint8)[:, None]
    images = {f"{split}_images": rng.integers(0, 256, shape, dtype=np.uint8) for split in ("train", "test")}
    return {**images, "train_labels": labels, "test_labels": labels[::-1]}


def npz_bytes(**content: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def test_table():
    assert len(MEDMNIST) == 18
    digests = [digest for info in MEDMNIST.values() for digest in info.md5]
    assert len(set(digests)) == 12 * 4 + 6 * 2
    assert all(len(digest) == 32 and int(digest, 16) for digest in digests)
    assert {flag for flag, info in MEDMNIST.items() if info.licence != "CC BY 4.0"} == {"dermamnist"}


@pytest.mark.parametrize("flag", MEDMNIST)
def test_bank_has_the_classes_of_the_set(flag):
    assert len(load_bank(flag).class_names) == MEDMNIST[flag].num_classes


class Trap:
    """An object whose unpickling would be seen."""

    def __reduce__(self):
        """Make a folder when unpickled."""
        return (Path.mkdir, (Path("unpickled"),))


def changed(**changes: np.ndarray) -> bytes:
    return npz_bytes(**{**arrays(), **changes})


def broken_inside() -> bytes:
    content = bytearray(changed())
    start = zipfile.ZipFile(io.BytesIO(content)).getinfo("train_images.npy").header_offset + 500
    content[start : start + 50] = bytes(50)
    return bytes(content)


BAD_FILES = {
    "cut short": (lambda: changed()[:-100], "not a whole npz"),
    "no npz": (lambda: b"<html>not found</html>", "not a whole npz"),
    "broken inside": (broken_inside, "damaged at train_images"),
    "pickled": (lambda: changed(train_images=np.array([Trap()] * 6, dtype=object)), "pickled objects at train_images"),
    "other keys": (lambda: npz_bytes(x=np.zeros(2), y=np.zeros(2)), "keys are x, y"),
    "no such split": (
        lambda: npz_bytes(**{k: v for k, v in arrays().items() if k.startswith("test")}),
        "splits are test",
    ),
    "lengths": (lambda: changed(train_labels=np.zeros((5, 1), np.uint8)), "6 train_images but 5 train_labels"),
    "float images": (lambda: changed(train_images=np.zeros((6, 28, 28))), "float64, it must be uint8"),
    "volumes": (lambda: changed(train_images=np.zeros((6, 28, 28, 28), np.uint8)), "shape"),
    "float labels": (lambda: changed(train_labels=np.zeros((6, 1))), "not integers"),
    "labels beyond": (lambda: changed(train_labels=np.full((6, 1), 2, np.uint8)), "labels run from 2 to 2"),
    "vector labels": (lambda: changed(train_labels=np.zeros((6, 14), np.uint8)), "14 columns"),
    "empty": (
        lambda: changed(train_images=np.zeros((0, 28, 28), np.uint8), train_labels=np.zeros((0, 1), np.uint8)),
        "empty",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_npz_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FILES[case]
    path = tmp_path / "breastmnist_mine.npz"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message) as error:
        load_image_dataset(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bloodmist", "did you mean 'bloodmnist'"),
        ("BloodMNIST", "did you mean 'bloodmnist'"),
        ("pathmnist_32", "no size 32"),
        ("organmnist3d_128", r"choose organmnist3d \(28 pixels\), organmnist3d_64$"),
        ("zzz", "known sets: pathmnist"),
    ],
)
def test_unknown_flag_names_the_nearest(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image_dataset(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing/bloodmnist.npz", "./nowhere", "/no/such/folder", "missing.parquet"])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_image_dataset(name)


def test_npz_of_an_unknown_set_needs_a_bank_for_captions(tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz_bytes(**arrays(channels=3)))
    plain = load_image_dataset(str(path))
    assert (plain.bank, plain.class_names, plain.licence) == (None, None, None)
    known = load_image_dataset(str(path), caption_bank="breastmnist", channels=1, resolution=16, max_samples=3)
    assert known.class_names == load_bank("breastmnist").class_names
    assert len(known) == len(known.labels) == 3
    assert known[2]["image"].shape == (16, 16, 1)
    (tmp_path / "many.npz").write_bytes(npz_bytes(**arrays(classes=5)))
    with pytest.raises(ValueError, match="has 5 classes, the bank breastmnist has 2"):
        load_image_dataset(str(tmp_path / "many.npz"), caption_bank="breastmnist")


def test_large_arrays_are_unpacked_once_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAP_ABOVE_BYTES", 0)
    path = tmp_path / "breastmnist.npz"
    path.write_bytes(npz_bytes(**arrays()))
    first = load_image_dataset(str(path), cache_dir=tmp_path / "cache")
    assert isinstance(first.images, np.memmap)
    assert np.array_equal(first.images, arrays()["train_images"])
    unpacked = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache" / "unpacked").iterdir()}
    small = load_image_dataset(str(path), cache_dir=tmp_path / "cache", resolution=14)
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache" / "unpacked").iterdir()} == unpacked
    assert small[0]["image"].shape == (14, 14, 3)
    path.write_bytes(changed(train_images=np.array([Trap()] * 6, dtype=object)))
    with pytest.raises(ValueError, match="pickled"):
        load_image_dataset(str(path), cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == len(unpacked)


@pytest.fixture
def organs(tmp_path) -> Path:
    """Return the path of an npz of volumes, each voxel of which tells its volume (0 to 2) and place."""
    volume, depth, row, column = np.ogrid[:3, :4, :4, :4]
    voxels = (64 * volume + 16 * depth + 4 * row + column).astype(np.uint8)
    path = tmp_path / "organmnist3d_tiny.npz"
    path.write_bytes(npz_bytes(train_images=voxels, train_labels=np.array([[10], [0], [3]], np.uint8)))
    return path


def test_volumes_become_their_central_slices(organs):
    dataset = load_image_dataset(str(organs))
    assert (len(dataset), dataset.bank, dataset.licence) == (9, "organmnist3d", "CC BY 4.0")
    assert [dataset.class_names[label] for label in dataset.labels[::3]] == ["pancreas", "liver", "femur-right"]
    assert dataset.labels.tolist() == [10] * 3 + [0] * 3 + [3] * 3
    voxels = np.load(organs)["train_images"]
    wanted = [voxels[1, 1], voxels[1, :, 1], voxels[1, :, :, 1]]
    assert all(np.array_equal(dataset[3 + axis]["image"][..., 0], wanted[axis]) for axis in range(3))
    two = load_image_dataset(str(organs), slice_axis=2, slices=2)
    assert len(two) == 6 and np.array_equal(two[5]["image"][..., 0], voxels[2, :, :, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slices": 5}, "have 1 to 4"), ({"slices": 0}, "have 1 to 4"), ({"slice_axis": 3}, "axes 0, 1 and 2")],
)
def test_slices_that_a_volume_does_not_have(organs, options, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(organs), **options)


def test_volumes_that_are_no_cubes_are_cut_across_one_axis(tmp_path):
    path = tmp_path / "organmnist3d_flat.npz"
    labels = np.zeros((2, 1), np.uint8)
    path.write_bytes(npz_bytes(train_images=np.zeros((2, 5, 6, 7), np.uint8), train_labels=labels))
    with pytest.raises(ValueError, match="no cubes: choose one slice_axis"):
        load_image_dataset(str(path))
    assert load_image_dataset(str(path), slice_axis=1)[0]["image"].shape == (5, 7, 3)


def test_images_drawn_for_a_set_of_volumes_load_as_they_are(tmp_path):
    path = tmp_path / "organmnist3d_drawn.npz"
    path.write_bytes(npz_bytes(**arrays(channels=3)))
    assert load_image_dataset(str(path)).images.shape == (6, 28, 28, 3)


def test_real_blood_and_its_subtypes(visbio_data):
    dataset = load_image_dataset(str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz"), "validation")
    assert (len(dataset), dataset.bank, dataset.split) == (1712, "bloodmnist", "val")
    assert dataset.images.shape == (1712, 28, 28, 3)
    table = datasets.load_dataset("parquet", data_files=str(visbio_data / "pbc64" / "val.parquet"), split="train")
    clear = [subtype if subtype in PBC_SUBTYPES.values() else None for subtype in table["subtype"][:]]
    assert dataset.labels.tolist() == table["label"][:]
    assert dataset.subtypes == clear
    assert len(set(clear)) == 6


def test_index_of_another_file_is_refused(visbio_data, tmp_path):
    index = visbio_data / "medmnist" / "bloodmnist_rebuilt_28_index.csv"
    (tmp_path / "bloodmnist_x_index.csv").write_bytes(index.read_bytes())
    (tmp_path / "bloodmnist_x.npz").write_bytes(npz_bytes(**arrays(channels=3)))
    with pytest.raises(ValueError, match=r"bloodmnist_x_index\.csv does not fit bloodmnist_x\.npz"):
        load_image_dataset(str(tmp_path / "bloodmnist_x.npz"))


@pytest.mark.parametrize("channels", [1, 3])
def test_real_grey_images_in_the_channels_asked_for(visbio_data, channels):
    path = str(visbio_data / "medmnist" / "pneumoniamnist_rebuilt_28.npz")
    item = load_image_dataset(path, "test", channels=channels)[0]
    raw = np.load(path, allow_pickle=False)["test_images"][0]
    assert item["image"].dtype == np.uint8
    assert np.array_equal(item["image"], np.repeat(raw[:, :, None], channels, axis=2))
    assert load_image_dataset(path, "test", channels=channels, resolution=32)[0]["image"].shape == (32, 32, channels)
