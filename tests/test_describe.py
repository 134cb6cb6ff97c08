"""visbio describe and visbio search, as on the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from visbio_diffusers.alignment import load_dual_encoder
from visbio_diffusers.alignment.describe import describe, read_candidates
from visbio_diffusers.alignment.dual_encoder import write_calibration
from visbio_diffusers.cli import main


@pytest.fixture
def model(tiny_dual_encoder_dir, tmp_path):
    """A tiny dual encoder that says which bank it knows, and to which everything is familiar."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_dual_encoder_dir, folder)
    (folder / "training.json").write_text(json.dumps({"caption_banks": ["bloodmnist"]}))
    return folder


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "cell.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file)
    return file


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err.strip()


def test_captions_with_their_probabilities(model, image, capsys):
    code, lines, _ = run(capsys, "describe", image, "--model", model, "--top", 8)
    assert (
        code == 0 and lines[0].startswith(f"{image}: 0.") and "a microscopy image of" in lines[0] and len(lines) == 8
    )
    shares = [float(line.replace(f"{image}:", "").split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=0.01)
    assert len(run(capsys, "describe", image, "--model", model, "--top", 99, "--subtypes")[1]) == 11


def test_captions_of_ones_own(model, image, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("a red cell\n\na blue cell\n")
    (tmp_path / "own.csv").write_text("label,caption\nred,a red cell\nred,a crimson one\nblue,a blue cell\n")
    assert read_candidates(str(tmp_path / "own.txt")) == {"a red cell": ["a red cell"], "a blue cell": ["a blue cell"]}
    assert read_candidates(str(tmp_path / "own.csv")) == {
        "red": ["a red cell", "a crimson one"],
        "blue": ["a blue cell"],
    }
    lines = run(capsys, "describe", image, "--model", model, "--captions", tmp_path / "own.csv")[1]
    assert {line.split()[-1] for line in lines} == {"red", "blue"}
    for content, message in (
        ("", "holds no captions"),
        ("a,b\n1,2\n", "has the columns a, b: it needs one named caption"),
    ):
        (tmp_path / "none.csv").write_text(content)
        code, _, error = run(capsys, "describe", image, "--model", model, "--captions", tmp_path / "none.csv")
        assert code == 1 and message in error and error.count("\n") == 0
    assert "no file" in run(capsys, "describe", image, "--model", model, "--captions", tmp_path / "gone.txt")[2]
    (model / "training.json").unlink()
    assert "does not say which captions it knows" in run(capsys, "describe", image, "--model", model)[2]


def test_none_of_these(model):
    encoder = load_dual_encoder(str(model), "cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
    features, labels = encoder.features(images), torch.arange(60) % 2
    write_calibration(model, encoder, "x", (features, labels), (features, labels, encoder.embed_texts(["a", "b"])))
    encoder = load_dual_encoder(str(model), "cpu")
    said = describe(encoder, features, [["a"], ["b"]])
    assert sum(bool(each.doubt) for each in said) <= 3
    far = describe(encoder, features + 50, [["a"], ["b"]])
    assert all("unlike all images" in each.doubt for each in far)
    encoder.calibration = encoder.calibration._replace(threshold=2.0)
    assert all("below 2.00" in each.doubt for each in describe(encoder, features[:3], [["a"], ["b"]]))


def test_what_decided(model, image, tiny_pipeline_dir, tmp_path, capsys):
    why = tmp_path / "why.png"
    flags = ["--model", model, "--explain", why, "--generator", tiny_pipeline_dir]
    code, lines, _ = run(capsys, "describe", image, *flags)
    assert code == 0 and Image.open(why).width > 400
    starts = [
        "runner-up: ",
        "words for: ",
        "words for the runner-up: ",
        f"second opinion, {tiny_pipeline_dir.name} ",
        "places: ",
    ]
    assert [line.startswith(start) for line, start in zip(lines[3:], starts, strict=True)] == [True] * 5
    code, _, error = run(capsys, "describe", image, image, *flags)
    assert code == 1 and "--explain is for one image, got 2" in error


def test_images_that_cannot_be_read(model, image, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    code, lines, _ = run(capsys, "describe", broken, image, "--model", model)
    assert code == 0 and "cannot read image" in lines[0] and lines[1].startswith(str(image))
    code, _, error = run(capsys, "describe", broken, "--model", model)
    assert code == 1 and "no image could be read of 1" in error
    (tmp_path / "none").mkdir()
    assert "no images in" in run(capsys, "describe", tmp_path / "none", "--model", model)[2]
    assert "no file or folder" in run(capsys, "describe", tmp_path / "gone.png", "--model", model)[2]
    large = tmp_path / "large.png"
    Image.new("RGB", (4000, 4000), "white").save(large)
    assert run(capsys, "describe", large, "--model", model)[0] == 0


def test_search_by_text_by_image_and_in_abstracts(model, image, tmp_path, capsys):
    place = tmp_path / "images"
    place.mkdir()
    shutil.copy(image, place / "same.png")
    Image.new("RGB", (8, 8), "red").save(place / "red.png")
    code, lines, _ = run(capsys, "search", "--image", image, place, "--model", model)
    assert code == 0 and lines[0].split() == ["1.000", str(place / "same.png")] and len(lines) == 2
    assert len(run(capsys, "search", "a red cell", place, "--model", model, "--top", 1)[1]) == 1
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text('{"pmid": "7", "abstract": "Red cells. Blue cells."}\n')
    code, lines, _ = run(capsys, "search", "--image", image, "--corpus", corpus, "--model", model)
    assert code == 0 and lines[0].split()[1] == "7" and lines[0].endswith("cells.")
    with pytest.raises(SystemExit, match="2"):
        main(["search", "blue cells", "--corpus", str(corpus)])
    assert "--corpus is searched by --image" in capsys.readouterr().err
    assert "the query is empty" in run(capsys, "search", " ", place, "--model", model)[2]
    with pytest.raises(SystemExit, match="2"):
        main(["search", str(place)])
    assert "give QUERY and FOLDER beside the flags, got 1 arguments" in capsys.readouterr().err
