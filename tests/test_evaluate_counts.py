"""How many nuclei there are: two counters, the choice of prompts, agreement, and the script."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from skimage.draw import disk

from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation import counts
from visbio_diffusers.evaluation.images import Split


ROOT = Path(__file__).parent.parent


def discs(centres, radius=6, side=64, colours=((10, 10, 10), (200, 200, 200))):
    """Return an image with discs of the second colour on the first."""
    image = np.full((side, side, 3), colours[0], np.uint8)
    for centre in centres:
        image[disk(centre, radius, shape=image.shape[:2])] = colours[1]
    return image


PALE, PURPLE = (230, 210, 235), (110, 60, 170)
APART = [(12, 12), (12, 45), (45, 12), (45, 45)]


def test_watershed_counts_discs_also_where_they_touch():
    images = np.stack([discs(APART[:1]), discs(APART), discs([(20, 20), (20, 31)], 7), discs([])])
    assert counts.count_by_watershed(images, np.ones(4, bool)).tolist() == [1, 4, 2, 0]
    stained = np.stack([discs(APART[:3], colours=(PALE, PURPLE)), discs(APART[:1], radius=3, colours=(PALE, PURPLE))])
    assert counts.count_by_watershed(stained, np.zeros(2, bool)).tolist() == [3, 0]  # 28 pixels are below 1 %
    small = np.stack([discs([(7, 7), (20, 20)], 3, side=28)])
    assert counts.count_by_watershed(small, np.ones(1, bool)).tolist() == [2]


def toy(n, seed):
    """Return images of 24 pixels with 0 to 4 discs that do not touch, and their number."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 5, n)
    places = [(6, 6), (6, 17), (17, 6), (17, 17)]
    images = [discs([places[k] for k in rng.permutation(4)[:number]], 3, side=24) for number in numbers]
    return Split(np.stack(images), numbers)


def test_network_learns_to_count_and_is_kept(tmp_path):
    train, test = toy(256, 0), toy(128, 1)
    model = counts.load_counter(tmp_path, train, 40)
    found = counts.count_by_network(model, test.images)
    assert spearmanr(found, test.labels).statistic > 0.8
    again = counts.load_counter(tmp_path, train, 1)
    assert np.allclose(found, counts.count_by_network(again, test.images, batch_size=50), atol=1e-4)
    with pytest.raises(ValueError, match="was trained on other images"):
        counts.load_counter(tmp_path, test, 1)


def test_prompts_are_of_every_count_and_stain():
    numbers = np.repeat([1, 2, 3, 5], [100, 30, 6, 50])  # none has four
    stains = np.zeros(len(numbers), int)
    stains[:5] = stains[100:103] = 1
    rows = counts.choose_tiles(numbers, stains, 24, seed=0)
    assert np.bincount(numbers[rows]).tolist() == [0, 8, 8, 8]
    assert (stains[rows][numbers[rows] == 1]).sum() == 4 and (stains[rows][numbers[rows] == 2]).sum() == 3
    assert len(set(rows[numbers[rows] == 3])) == 6  # of which two come again
    assert np.array_equal(rows, counts.choose_tiles(numbers, stains, 24, seed=0))
    assert (rows != counts.choose_tiles(numbers, stains, 24, seed=1)).any()
    with pytest.raises(ValueError, match="fewer than 5 tiles with one nucleus"):
        counts.choose_tiles(numbers[100:], stains[100:], 4, seed=0)


def test_agreement_by_hand():
    asked, measured = np.array([1, 2, 3, 4, 5, 6]), np.array([1.2, 1.9, 5.0, 3.0, 5.1, 9.0])
    found = counts.agreement(measured, asked, np.arange(6), np.zeros(6, int))
    assert found["spearman"]["value"] == pytest.approx(spearmanr(measured, asked).statistic)
    assert found["mean_absolute_error"]["value"] == pytest.approx((0.2 + 0.1 + 2 + 1 + 0.1 + 3) / 6)
    assert found["bias"]["value"] == pytest.approx((0.2 - 0.1 + 2 - 1 + 0.1 + 3) / 6)
    assert found["exact"]["value"] == 0.5 and found["n"] == 6
    assert found["spearman_of_number"]["value"] == pytest.approx(found["spearman"]["value"])  # all else is the same
    for entry in (found["spearman"], found["bias"]):
        assert entry["low"] < entry["value"] < entry["high"]
    assert counts.agreement(measured, np.ones(6), np.arange(6), np.zeros(6, int))["spearman"]["value"] is None


def test_what_follows_other_words_alone_does_not_follow_the_number():
    captions = ["fluorescence image, one small nucleus, sparse", "fluorescence image, two small nuclei, sparse"]
    captions += [
        "fluorescence image, two small nuclei of 9 um, crowded",
        "fluorescence image, 31 large nuclei, sparse",
    ]
    assert counts.other_words(captions).tolist() == [2, 2, 1, 0]
    rng = np.random.default_rng(0)
    words = np.repeat([0, 1], 200)
    asked = np.concatenate([rng.integers(1, 4, 200), rng.integers(6, 9, 200)])
    by_words, by_number = 2 + 5 * words + rng.normal(0, 1, 400), asked + rng.normal(0, 0.5, 400)
    for measured, of_number in ((by_words, 0), (by_number, 0.8)):
        found = counts.agreement(measured, asked, np.arange(400), words)
        assert found["spearman"]["value"] > 0.7
        assert abs(found["spearman_of_number"]["value"] - of_number) < 0.15


def test_the_same_tiles_again_make_no_interval_narrower():
    rng = np.random.default_rng(0)
    asked = rng.integers(1, 9, 60)
    measured = asked + rng.normal(0, 2, 60)
    parts = measured, asked, np.arange(60), np.zeros(60, int)
    once, often = (counts.agreement(*(np.tile(each, k) for each in parts))["spearman"] for k in (1, 9))
    assert often["value"] == pytest.approx(once["value"])
    assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=0.3)


@pytest.fixture(scope="module")
def photographs(visbio_data, tmp_path_factory):
    """A few real photographs of nuclei, those of a small tile size, in folders that are splits."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        for kind in ("img", "masks"):
            file = visbio_data / "dsb2018_cellpose" / f"{number:03d}_{kind}.png"
            place = folder / ("train", "test")[number % 2] / file.name
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(file)
    return folder


def test_watershed_counts_real_nuclei(photographs):
    dataset = load_image_dataset(str(photographs), "test")
    tiles = counts.counted(dataset)
    found = counts.count_by_watershed(tiles.images, dataset.labels == 0)
    assert len(tiles.labels) > 50 and spearmanr(found, tiles.labels).statistic > 0.6
    with pytest.raises(ValueError, match="no masks to count in"):
        counts.counted(dataset.__class__("cells", "test", dataset.images))


def test_script_measures_drawn_and_real_images(photographs, tiny_pipeline_dir, tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_counts.py"))
    flags = ["--model", str(tiny_pipeline_dir), "--dataset_name", str(photographs), "--num_images", "12"]
    flags += ["--num_inference_steps", "2", "--counter_steps", "3", "--device", "cpu", "--guidance_scale", "2"]
    flags += ["--evaluators", str(tmp_path / "judges"), "--output", str(tmp_path / "counts.json")]
    assert script["main"](script["parse"](script["EvaluateCountsConfig"], {}, flags)) == 0
    results = json.loads((tmp_path / "counts.json").read_text())
    assert results["resolution"] == 8 and sum(results["asked"].values()) == 12
    assert results["drawing"]["guidance_scale"] == 2 and (tmp_path / "judges" / "counter").is_dir()
    for measure in ("network", "watershed"):
        entries = results["measures"][measure]
        assert entries["generated"]["overall"]["n"] == entries["real_same_prompts"]["overall"]["n"] == 12
        assert (
            sum(each["n"] for each in entries["real_test"]["by_stain"].values())
            == entries["real_test"]["overall"]["n"]
        )
    assert "| watershed | generated, against asked | all |" in capsys.readouterr().out
    assert Image.open(tmp_path / "counts.png").width == 640
    assert Image.open(tmp_path / "counts-sheet.png").height > 64
    with pytest.raises(SystemExit):
        script["parse"](script["EvaluateCountsConfig"], {}, [*flags, "--num_images", "0"])
    assert "num_images, counter_steps and tile_size must be at least 1" in capsys.readouterr().err
