"""Subtypes: which there are, their images and captions, shares, and the script."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation.metrics import fidelity
from visbio_diffusers.evaluation.subtypes import Subtypes, at_equal_shares, by_prompt


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cells(visbio_data, tmp_path_factory):
    """A few real cells of every class, with their subtypes."""
    folder = tmp_path_factory.mktemp("cells")
    for split in ("train", "test"):
        pq.write_table(pq.read_table(visbio_data / "pbc64" / f"{split}.parquet")[:150], folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def subtypes():
    return Subtypes(load_bank("bloodmnist"))


def test_a_class_without_subtypes_is_one(subtypes):
    assert len(subtypes.names) == 11 and subtypes.names[3:6] == ("promyelocyte", "myelocyte", "metamyelocyte")
    assert subtypes.classes.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7]
    assert subtypes.plain_caption(4) == "a microscopy image of a myelocyte"
    assert subtypes.plain_caption(0) == "a microscopy image of a basophil"


def test_heldout_captions_name_their_subtype_and_no_other(subtypes):
    captions = [subtypes.heldout_captions(row) for row in range(11)]
    assert all(len(each) >= 8 for each in captions)
    together = [text for each in captions for text in each]
    assert len(set(together)) == len(together)
    assert all("metamyelocyte" not in text and "promyelocyte" not in text for text in captions[4])
    assert all("band form" in text for text in captions[8])


def test_real_images_are_those_whose_subtype_is_known(subtypes, cells):
    dataset = load_image_dataset(str(cells), "train", caption_bank="bloodmnist", resolution=28)
    split = subtypes.real(dataset)
    unknown = sum(name is None and dataset.labels[k] in (3, 6) for k, name in enumerate(dataset.subtypes))
    assert len(split.labels) == len(split.images) == 150 - unknown and split.images.shape[1:] == (28, 28, 3)
    first = next(k for k, name in enumerate(dataset.subtypes) if name == "band neutrophil")
    assert any(np.array_equal(dataset[first]["image"], each) for each in split.images[split.labels == 8])
    dataset.subtypes = None
    with pytest.raises(ValueError, match="has a subtype of the bank"):
        subtypes.real(dataset.select(np.flatnonzero(dataset.labels == 6)))


def test_shares_by_hand():
    labels = np.array([0] * 8 + [1] * 2)
    found = fidelity(np.array([0] * 8 + [1, 0]), labels, ("a", "b", "absent"))
    assert found["overall"]["value"] == 0.9 and at_equal_shares(found)["value"] == 0.75
    reach = 1.96 * (0.25 / 2) ** 0.5 / 2
    assert at_equal_shares(found)["low"] == pytest.approx(0.75 - reach, abs=1e-3)
    right = by_prompt(np.array([True, True, False, False]), ["x", "x", "y", "y"])
    assert right == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2}


def test_script_measures_drawn_and_real_images(cells, tiny_pipeline_dir, tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_subtypes.py"))
    flags = ["--model", str(tiny_pipeline_dir), "--dataset_name", str(cells), "--num_images_per_subtype", "2"]
    flags += ["--num_wording_images_per_subtype", "5", "--num_inference_steps", "1", "--evaluator_steps", "2"]
    flags += ["--device", "cpu", "--output", str(tmp_path / "subtypes.json")]
    assert script["main"](script["parse"](script["EvaluateSubtypesConfig"], {}, flags)) == 0
    results = json.loads((tmp_path / "subtypes.json").read_text())
    for name in ("cnn3", "cnn5"):
        assert (tmp_path / "subtypes" / "evaluators" / name).is_dir()
        entry = results["evaluators"][name]
        assert np.sum(entry["generated"]["confusion"], axis=1).tolist() == [2] * 11
        assert entry["heldout_wording"]["overall"]["n"] == 55 and entry["heldout_wording"]["by_prompt"]["n"] == 22
        assert entry["real_test"]["overall"]["n"] > 100
    assert "| promyelocyte |" in capsys.readouterr().out
    assert Image.open(tmp_path / "subtypes.png").height > 11 * 64

    again = script["parse"](script["EvaluateSubtypesConfig"], {}, [*flags, "--num_wording_images_per_subtype", "0"])
    assert script["main"](again) == 0
    results = json.loads((tmp_path / "subtypes.json").read_text())
    assert all("heldout_wording" not in entry for entry in results["evaluators"].values())
