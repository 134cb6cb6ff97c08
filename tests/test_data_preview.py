"""A look at image sets: figures and sheet of each kind of set, captions that are missing or too long."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers.cli import main
from visbio_diffusers.data import load_image_dataset, preview
from visbio_diffusers.data.preview import CaptionLengths


def save_images(folder: Path, *names: str, size: tuple[int, int] = (12, 10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        seed = sum(name.encode())  # equal names, equal pixels
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def load(tmp_path):
    """Return `load_image_dataset` with a cache of its own."""
    return lambda name, *args, **options: load_image_dataset(str(name), *args, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def look(tmp_path, monkeypatch, tiny_pipeline_dir, capsys):
    """Return a function that runs `visbio data preview`, and returns its lines and its JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[list[str], dict]:
        encoder = ["--text-encoder", str(tiny_pipeline_dir), "--json", "out/figures.json"]
        assert main(["data", "preview", *map(str, arguments), *encoder]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "preview.png" and Image.open("preview.png").width > 100
        return lines, json.loads(Path("out/figures.json").read_text(encoding="utf-8"))

    return run


def test_figures_are_those_of_all_pixels(load, tmp_path):
    save_images(tmp_path / "set" / "a", "0.png", "1.png")
    save_images(tmp_path / "set" / "b", "2.png", size=(30, 20))
    figures = preview(load(tmp_path / "set"), tmp_path / "out" / "sheet.png", num_images=2)
    files = (tmp_path / "set").rglob("*.png")
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in files])
    assert figures["class_counts"] == {"a": 2, "b": 1}
    assert (figures["smallest"], figures["largest"], figures["channels"]) == ((10, 12), (20, 30), 3)
    assert figures["sizes"] == [((10, 12), 2), ((20, 30), 1)]
    for channel, name in enumerate(("red", "green", "blue")):
        found, wanted = figures["intensity"][name], pixels[:, channel]
        assert (found["minimum"], found["maximum"]) == (wanted.min(), wanted.max())
        assert found["mean"] == pytest.approx(wanted.mean(), abs=0.01)
        assert found["std"] == pytest.approx(wanted.std(), abs=0.01)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 100
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="num_images=0"):
        preview(load(tmp_path / "set"), tmp_path / "out" / "sheet.png", num_images=0)


def test_folder_without_captions_is_shown_and_told_how_to_get_them(look, tmp_path):
    save_images(tmp_path / "set", "0.png", "1.png", "2.png")
    lines, figures = look("set")
    assert lines[0] == "set, train: 3 images of 10 x 12 pixels, licence unknown"
    assert any('no captions: write metadata.jsonl beside the images, for each a line {"file_name"' in s for s in lines)
    assert (figures["captioned"], figures["tokens"], figures["class_counts"]) == (False, None, None)
    with pytest.raises(ValueError, match="no column 'text'"):
        load_image_dataset("set")


def test_npz_without_a_bank_is_shown_by_rows(look, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=np.array([0, 2, 2, 2]))
    lines, figures = look("mine.npz")
    assert any("give a --caption-bank that describes the labels" in line for line in lines)
    assert figures["class_counts"] == {"0": 1, "1": 0, "2": 3}
    assert list(figures["intensity"]) == ["grey"]


def test_captions_too_long_are_counted_and_the_longest_shown(look, tmp_path):
    save_images(tmp_path / "set", "0.png", "1.png", "2.png")
    captions = [
        "cell",
        " ".join("c" * 158),
        " ".join("c" * 159),
    ]  # one token a letter, two at the ends: the encoder takes 160
    (tmp_path / "set" / "metadata.csv").write_text(
        "file_name,words\n" + "".join(f"{number}.png,{caption}\n" for number, caption in enumerate(captions))
    )
    lines, figures = look("set", "--caption-column", "words")
    wanted = {"captions": 3, "limit": 160, "too_long": 1, "longest": 161, "example": captions[2]}
    assert figures["tokens"] == wanted
    assert f"1 captions are cut, such as: {captions[2]}" in lines


def test_duplicates_across_splits_and_classes_are_named_by_file(look, tmp_path):
    save_images(tmp_path / "set" / "train" / "a", "0.png", "1.png")
    save_images(tmp_path / "set" / "train" / "b", "0.png", "2.png")
    save_images(tmp_path / "set" / "test" / "b", "2.png", "3.png")
    lines, figures = look("set")
    found = figures["duplicates"]
    assert found["splits"] == {"train": 4, "test": 2}
    assert [found["exact"][name] for name in ("groups", "images", "across_splits", "in_conflict")] == [2, 4, 1, 1]
    names = [
        [(name.split()[0], "/".join(Path(name).parts[-2:])) for name in group] for group in found["exact"]["first"]
    ]
    assert names == [[("train", "a/0.png"), ("train", "b/0.png")], [("train", "b/2.png"), ("test", "b/2.png")]]
    assert any(line.startswith("the same pixels: groups 2, across splits 1, of different classes 1") for line in lines)
    assert any(line.startswith("nearly the same look") and "none in train 4, test 2" in line for line in lines)


def test_volumes_and_photographs_with_masks(look, tmp_path, visbio_data):
    voxels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "synapsemnist3d_x.npz", train_images=voxels, train_labels=np.array([0, 1]))
    assert look("synapsemnist3d_x.npz")[1]["class_counts"] == {"inhibitory synapse": 3, "excitatory synapse": 3}
    assert look("synapsemnist3d_x.npz", "--slice-axis", "1", "--slices", "2")[1]["num_images"] == 4
    (tmp_path / "nuclei").mkdir()
    for path in sorted((visbio_data / "dsb2018_cellpose").glob("00*_*.png"))[:40]:
        (tmp_path / "nuclei" / path.name).symlink_to(path)
    figures = look("nuclei")[1]
    assert figures["captioned"] and sum(figures["class_counts"].values()) == figures["num_images"] > 20


def test_real_parquet(look, visbio_data):
    figures = look(visbio_data / "pbc64" / "val.parquet", "--caption-bank", "bloodmnist")[1]
    assert figures["num_images"] == 1712 and figures["smallest"] == [64, 64]
    assert figures["subtype_counts"]["segmented neutrophil"] > 50
    assert figures["tokens"]["captions"] > 500


def test_lengths_agree_with_the_tokenizer_one_by_one(tiny_text):
    _, tokenizer = tiny_text
    lengths = CaptionLengths(tokenizer, 6)
    lengths.add(["ab", "abcde"])
    lengths.add(["abc d"])
    assert lengths.longest == len(tokenizer.encode("abcde")) == 7
    assert lengths.too_long == 1 and lengths.captions == 3
