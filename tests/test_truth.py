"""Where the truth is known: it is carried along exactly, lies off the middle, and the shipped model finds it."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu

from visbio_diffusers.explanation.attribution import HEADS, attribute_image
from visbio_diffusers.explanation.truth import (
    centred_gaussian,
    mean_interval,
    move_off_centre,
    off_centre_cells,
    off_centre_nuclei,
    pixel_auc,
    stained_cell,
)
from visbio_diffusers.load import DEFAULT_MODEL, load_pipeline


@pytest.fixture(scope="module")
def cells(visbio_data):
    return off_centre_cells(str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz"), "val", 16)


def test_auc_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    mask = rng.random((9, 11)) < 0.3
    for values in (rng.random((9, 11)), rng.integers(0, 4, (9, 11)), np.ones((9, 11))):
        expected = mannwhitneyu(values[mask], values[~mask]).statistic / mask.sum() / (~mask).sum()
        assert pixel_auc(values, mask) == pytest.approx(expected)
    assert pixel_auc(mask.astype(float), mask) == 1 and pixel_auc(-mask.astype(float), mask) == 0


def test_interval_of_a_mean():
    found = mean_interval(np.array([0.0, 1.0, 2.0, 3.0]))
    assert found["value"] == 1.5 and found["n"] == 4
    assert found["high"] - found["value"] == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2, rel=1e-4)


@pytest.mark.parametrize("shifts", [(3, 4), (-3, 4), (3, -4), (-3, -4)])
def test_a_cell_is_moved_whole_and_leaves_background(shifts):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 100, (28, 28, 3), dtype=np.uint8), np.zeros((28, 28), bool)
    mask[9:19, 10:18] = True
    image[mask] = 200 + rng.integers(0, 50, (80, 3), dtype=np.uint8)
    moved, place = move_off_centre(image, mask, shifts)
    assert np.array_equal(place, np.roll(mask, shifts, axis=(0, 1)))
    assert np.array_equal(moved[place], image[mask])
    assert moved[~place].max() < 100  # no second cell
    assert moved.shape == image.shape and moved.dtype == np.uint8


def test_cells_without_room_for_background_are_not_moved():
    mask = np.zeros((28, 28), bool)
    mask[4:24, 4:24] = True
    assert move_off_centre(np.zeros((28, 28, 3), np.uint8), mask, (7, 7)) is None


def test_the_stained_cell_is_one_in_the_middle():
    image = np.full((28, 28, 3), 240, np.uint8)
    image[10:18, 9:19] = (90, 20, 140)
    assert np.array_equal(stained_cell(image), (image[:, :, 1] == 20))
    image[1:7, 1:7] = (90, 20, 140)
    assert stained_cell(image) is None  # of two cells


def test_real_cells_lie_off_the_middle(cells):
    assert cells.images.shape == (16, 28, 28, 3) and cells.masks.shape == (16, 28, 28)
    middle = [pixel_auc(centred_gaussian(28, 28), mask) for mask in cells.masks]
    assert np.mean(middle) < 0.55
    assert all(f"{word}, Wright-Giemsa stain" in text for word, text in zip(cells.words, cells.prompts))
    dark = [pixel_auc(-image.mean(axis=2), mask) for image, mask in zip(cells.images, cells.masks)]
    assert np.mean(dark) > 0.95  # the mask is on the stained cell


def test_nuclei_lie_off_the_middle(visbio_data, tmp_path):
    for path in sorted((visbio_data / "dsb2018_cellpose").glob("*.png"))[:60]:
        (tmp_path / path.name).symlink_to(path)
    tiles = off_centre_nuclei(str(tmp_path), "train", 12)
    rows, columns = np.mgrid[:28, :28] - 13.5
    distance = rows**2 + columns**2
    assert all(distance[mask].mean() > distance.mean() for mask in tiles.masks)
    assert all(word in text for word, text in zip(tiles.words, tiles.prompts))


def test_nuclei_in_the_middle_are_left_out(tmp_path):
    masks = np.pad(np.ones((20, 20), np.uint8), 22)
    for number in range(6):
        Image.fromarray(masks * 200).save(tmp_path / f"{number}_img.png")
        Image.fromarray(masks).save(tmp_path / f"{number}_masks.png")
    with pytest.raises(ValueError, match="no tile whose nuclei lie off the middle"):
        off_centre_nuclei(str(tmp_path), "train", 1)


def test_the_cell_is_found_off_the_middle_by_its_name_alone(cells):
    pipe, _ = load_pipeline(device="cpu")
    aucs = []
    for row, image in enumerate(cells.images):
        found = attribute_image(pipe, Image.fromarray(image), cells.prompts[row], HEADS[DEFAULT_MODEL], num_noises=1)
        own = found.words.index(cells.words[row])
        aucs.append([pixel_auc(each, cells.masks[row]) for each in (found.maps[own], found.maps[-1])])
    right, stain = np.mean(aucs, axis=0)
    middle = np.mean([pixel_auc(centred_gaussian(28, 28), mask) for mask in cells.masks])
    assert right > 0.9 and right > middle + 0.3 and stain < 0.4
