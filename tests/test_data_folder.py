"""Image folders, parquet and Hub sets: captions, classes, subtypes, forms of images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from visbio_diffusers.data import caption_pools, load_image_dataset
from visbio_diffusers.data import dataset as dataset_module


def save_images(folder: Path, *names: str, size: tuple[int, int] = (12, 10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def load(tmp_path):
    """Return `load_image_dataset` with a cache of its own."""
    return lambda name, *args, **options: load_image_dataset(str(name), *args, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions_from_metadata(load, tmp_path, form, caplog):
    save_images(tmp_path / "set", "b.png", "a.png", "c.png")
    if form == "jsonl":
        write_metadata(tmp_path / "set", [{"file_name": f"{n}.png", "words": f"cell {n}"} for n in "ab"])
    else:
        (tmp_path / "set" / "metadata.csv").write_text("file_name,words\na.png,cell a\nb.png,cell b\n")
    dataset = load(tmp_path / "set", caption_column="words", resolution=8)
    captions = {item["caption"]: item["image"] for item in (dataset[0], dataset[1])}
    assert len(dataset) == 2
    assert "1 of 3 images" in caplog.text  # c.png has no line
    wanted = Image.open(tmp_path / "set" / "a.png").resize((8, 8), Image.BICUBIC, box=(1, 0, 11, 10))
    assert np.array_equal(captions["cell a"], np.asarray(wanted))
    assert caption_pools([dataset], 64, 0)[0](0, dataset[0], None) == dataset[0]["caption"]


def test_classes_from_subfolders_and_splits(load, tmp_path):
    for split, num in (("train", 3), ("val", 1)):
        for name in ("Platelets", "basophil"):
            save_images(tmp_path / "set" / split / name, *(f"{i}.png" for i in range(num)))
    train, val = load(tmp_path / "set"), load(tmp_path / "set", "val")
    assert (len(train), len(val)) == (6, 2)
    assert train.class_names == ("Platelets", "basophil")
    assert caption_pools([train], 64, 0)[0](0, train[0], np.random.default_rng(0)) == "a microscopy image of Platelets"
    described = load(tmp_path / "set", caption_bank="bloodmnist")  # renumbered to the order of the bank
    assert described.labels.tolist() == [7, 7, 7, 0, 0, 0]
    assert described.class_names[7] == "platelet"
    with pytest.raises(ValueError, match="has no class 'Platelets' of set"):
        load(tmp_path / "set", caption_bank="pneumoniamnist")
    with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
        load(tmp_path / "set", "test")


def test_images_of_all_kinds_become_eight_bit(load, tmp_path):
    folder = tmp_path / "set"
    save_images(folder, "rgb.png")
    wide = (np.arange(120).reshape(10, 12) * 550).astype(np.uint16)  # up to 65,450: saturates where only clipped
    Image.fromarray(wide).save(folder / "deep.tif")
    Image.fromarray(np.zeros((10, 12), np.uint8)).convert("P").save(folder / "palette.png")
    names = ["rgb.png", "deep.tif", "palette.png"]
    write_metadata(folder, [{"file_name": name, "text": name} for name in names])
    grey, colour = load(folder, channels=1), load(folder)
    items = {item["caption"]: item["image"] for item in (grey[i] for i in range(3))}
    assert {image.shape for image in items.values()} == {(10, 12, 1)}
    assert np.array_equal(items["deep.tif"][:, :, 0], wide // 257)
    assert all(colour[i]["image"].shape == (10, 12, 3) and colour[i]["image"].dtype == np.uint8 for i in range(3))
    Image.fromarray(np.zeros((10, 12), np.float32)).save(folder / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif \(32-bit floats"):
        [load(folder)[i] for i in range(3)]


@pytest.mark.parametrize("captions", [["x", None, " "], [None, "", "x"]])
def test_missing_captions_are_counted_and_the_first_named(load, tmp_path, captions):
    paths = [str(tmp_path / "set" / f"{i}.png") for i in range(3)]
    save_images(tmp_path / "set", "0.png", "1.png", "2.png")
    write_metadata(tmp_path / "set", [{"file_name": f"{i}.png", "text": c} for i, c in enumerate(captions)])
    table = datasets.Dataset.from_dict({"image": paths, "text": captions}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "set.parquet")
    first = next(index for index, caption in enumerate(captions) if caption != "x")
    for name in ("set", "set.parquet"):
        with pytest.raises(ValueError, match=rf"2 of 3 captions .*{first}\.png") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize(("encoding", "code"), [("latin-1", "ISO-8859-1"), ("utf-16", "UTF-16")])
def test_captions_in_another_encoding(load, tmp_path, form, encoding, code):
    save_images(tmp_path / "set", "0.png", "1.png")
    text = {
        "csv": "file_name,text\n0.png,cell\n1.png,F\u00e4rbung\n",
        "jsonl": '{"file_name": "0.png", "text": "cell"}\n\n{"file_name": "1.png", "text": "F\u00e4rbung"}\n',
    }[form]
    path = tmp_path / "set" / f"metadata.{form}"
    path.write_text(text, encoding=encoding)
    line = 1 if encoding == "utf-16" else 3
    with pytest.raises(ValueError, match=rf"metadata\.{form} line {line}: .* not UTF-8: .* -f {code} ") as error:
        load(tmp_path / "set")
    assert "\n" not in str(error.value)
    path.write_text(text, encoding="utf-8-sig" if form == "csv" else "utf-8")  # as spreadsheets write it
    assert {load(tmp_path / "set")[index]["caption"] for index in (0, 1)} == {"cell", "F\u00e4rbung"}


def no_captions(folder: Path) -> dict:
    save_images(folder, "0.png")
    return {}


def other_caption_column(folder: Path) -> dict:
    save_images(folder, "0.png")
    write_metadata(folder, [{"file_name": "0.png", "title": "x"}])
    return {}


def asked_for_caption_column(folder: Path) -> dict:
    save_images(folder / "a", "0.png")
    save_images(folder / "b", "0.png")
    return {"caption_column": "caption"}


def other_image_column(folder: Path) -> dict:
    other_caption_column(folder)
    return {"image_column": "picture", "caption_column": "title"}


def not_an_image_column(folder: Path) -> dict:
    other_caption_column(folder)
    return {"image_column": "title", "caption_column": "title"}


def unreadable_image(folder: Path) -> dict:
    save_images(folder, "0.png", "1.png")
    (folder / "1.png").write_bytes(b"no image")
    write_metadata(folder, [{"file_name": f"{i}.png", "text": "x"} for i in range(2)])
    return {}


def listed_but_absent(folder: Path) -> dict:
    save_images(folder, "0.png")
    write_metadata(folder, [{"file_name": f"{i}.png", "text": "x"} for i in range(2)])
    return {}


def broken_metadata(folder: Path) -> dict:
    save_images(folder, "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_na')
    return {}


def bank_without_labels(folder: Path) -> dict:
    other_caption_column(folder)
    return {"caption_bank": "bloodmnist"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (no_captions, "no column 'text', only image: .*metadata.jsonl"),
        (other_caption_column, "no column 'text', only image, title: choose with --caption_column"),
        (asked_for_caption_column, "no column 'caption', only image, label"),
        (other_image_column, "no column 'picture', only image, title: choose with --image_column"),
        (not_an_image_column, "'title' of .* holds no images"),
        (unreadable_image, r"set/1\.png \(no image format"),
        (listed_but_absent, r"set/1\.png"),
        (broken_metadata, "cannot read .*set: JSON"),
        (bank_without_labels, "no labels for the bank bloodmnist: choose with --label_column"),
    ],
)
def test_bad_folder_is_refused_in_one_line(load, tmp_path, build, message):
    options = build(tmp_path / "set")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "set", **options)
    assert "\n" not in str(error.value)


def test_image_cut_short_is_named_when_it_is_met(load, tmp_path):
    save_images(tmp_path / "set", "0.png", size=(80, 80))
    path = tmp_path / "set" / "0.png"
    path.write_bytes(path.read_bytes()[:-2000])
    write_metadata(tmp_path / "set", [{"file_name": "0.png", "text": "x"}])
    with pytest.raises(ValueError, match=r"set/0\.png \(.*: replace or remove it"):
        load(tmp_path / "set")[0]


def test_empty_folder_foreign_file_and_hub_set_out_of_reach(load, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no images and no parquet files in"):
        load(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="neither .npz nor .parquet"):
        load(tmp_path / "notes.txt")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cannot read .*cut\.parquet: Parquet"):
        load(tmp_path / "cut.parquet")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no file or folder owner/set here, and no Hub set within reach") as error:
        load("owner/set")
    assert "\n" not in str(error.value)


def test_real_parquet_with_classes_and_subtypes(load, visbio_data):
    options = {"caption_bank": "bloodmnist", "resolution": 32}
    dataset = load(visbio_data / "pbc64" / "val.parquet", max_samples=200, **options)
    assert len(dataset) == len(dataset.subtypes) == 200
    assert set(dataset.labels.tolist()) == set(range(8))  # not the first 200, and of all classes
    assert dataset.class_names[6] == "neutrophil"
    assert {s for s, label in zip(dataset.subtypes, dataset.labels, strict=True) if label == 6} >= {
        "band neutrophil",
        "segmented neutrophil",
    }
    assert {s for s, label in zip(dataset.subtypes, dataset.labels, strict=True) if label == 0} == {None}
    again = load(visbio_data / "pbc64" / "val.parquet", max_samples=200, **options)
    for index in (0, 199):
        assert np.array_equal(dataset[index]["image"], again[index]["image"])
        assert dataset[index]["image"].shape == (32, 32, 3)
    caption = caption_pools([dataset], 64, 0)[0](0, dataset[0], np.random.default_rng(0))
    assert isinstance(caption, str) and caption


def test_decoded_images_are_kept_only_if_all_fit(load, tmp_path, monkeypatch):
    save_images(tmp_path / "set", "0.png", "1.png")
    write_metadata(tmp_path / "set", [{"file_name": f"{i}.png", "text": "x"} for i in range(2)])
    kept = load(tmp_path / "set", resolution=8)
    first = kept[1]["image"].copy()
    assert kept.kept[1].tolist() == [False, True]
    assert np.array_equal(kept[1]["image"], first)
    monkeypatch.setattr(dataset_module, "KEEP_BYTES", 2 * 8 * 8 * 3 - 1)
    lazy = load(tmp_path / "set", resolution=8)
    assert lazy.kept is None
    assert np.array_equal(lazy[1]["image"], first)


def test_subtype_that_the_bank_does_not_know_is_refused_before_training(load, tmp_path):
    save_images(tmp_path, "0.png")
    table = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "0.png")], "label": ["neutrophil"], "subtype": ["giant neutrophil"]}
    )
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="giant neutrophil"):
        caption_pools([load(tmp_path / "set.parquet", caption_bank="bloodmnist")], 64, 0)[0]
