"""Images found by text and by image, texts found by image, and the index that keeps what was embedded."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from visbio_diffusers.alignment import load_dual_encoder
from visbio_diffusers.alignment.search import index_corpus, index_images, nearest, search_texts


@pytest.fixture
def encoder(tiny_dual_encoder_dir, monkeypatch):
    """A dual encoder that counts what it is asked to embed."""
    loaded = load_dual_encoder(str(tiny_dual_encoder_dir), "cpu")
    loaded.asked = 0

    def counting(embed):
        def counted(content):
            loaded.asked += len(content)
            return embed(content)

        return counted

    for name in ("embed_images", "embed_texts"):
        monkeypatch.setattr(loaded, name, counting(getattr(loaded, name)))
    return loaded


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    (place / "inner").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png", "inner/c.png"):
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(place / name)
    return place


def test_an_image_finds_itself_first_and_all_by_cosine(encoder, folder):
    index = index_images(encoder, folder)
    query = encoder.embed_images([Image.open(folder / "b.png")])[0]
    found = nearest(index, query, 5)
    assert found[0][0]["file"] == "b.png" and found[0][1] == pytest.approx(1.0, abs=1e-5) and len(found) == 3
    expected = sorted((index.rows @ query).tolist(), reverse=True)
    assert [cosine for _, cosine in found] == pytest.approx(expected)


def test_only_what_is_new_or_changed_is_embedded(encoder, folder):
    index_images(encoder, folder)
    assert encoder.asked == 3
    first = index_images(encoder, folder)
    assert encoder.asked == 3
    Image.new("RGB", (12, 12), "red").save(folder / "d.png")
    Image.new("RGB", (12, 12), "blue").save(folder / "a.png")
    os.utime(folder / "a.png", (1, 1))
    (folder / "b.png").unlink()
    again = index_images(encoder, folder)
    assert encoder.asked == 5 and {entry["file"] for entry in again.entries} == {"a.png", "d.png", "inner/c.png"}
    kept = [
        next(i for i, entry in enumerate(each.entries) if entry["file"] == "inner/c.png") for each in (first, again)
    ]
    assert torch.equal(first.rows[kept[0]], again.rows[kept[1]])


def test_unreadable_images_are_left_out_by_name(encoder, folder, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    assert len(index_images(encoder, folder).entries) == 3
    assert "left out: cannot read image" in capsys.readouterr().err
    for name in ("a.png", "b.png", "inner/c.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="nothing for the index .* could be read"):
        index_images(encoder, folder)


def test_index_of_another_model_or_damaged_is_refused(encoder, folder, tmp_path):
    file = tmp_path / "index.safetensors"
    index_images(encoder, folder, file)
    encoder.sha256 = "another"
    with pytest.raises(ValueError, match=f"index.safetensors was made by another model, {encoder.name}: remove it"):
        index_images(encoder, folder, file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="index.safetensors is damaged: remove it"):
        index_images(encoder, folder, file)
    with pytest.raises(FileNotFoundError, match="no folder .*gone"):
        index_images(encoder, folder / "gone")


def test_abstracts_by_their_nearest_sentence(encoder, tmp_path):
    corpus = tmp_path / "texts.jsonl"
    rows = [
        {"pmid": "11", "title": "On cells.", "abstract": "They are round. Some are long."},
        {"pmid": 12, "abstract": "Nothing of that."},
        {"text": "No number here."},
    ]
    corpus.write_text("\n".join(json.dumps(row) for row in rows))
    index = index_corpus(encoder, corpus)
    assert [entry["sentence"] for entry in index.entries] == [
        "On cells.", "They are round.", "Some are long.", "Nothing of that.", "No number here."
    ]  # fmt: skip
    found = search_texts(index, encoder.embed_texts(["Some are long."])[0], 2)
    assert found[0].place == "11" and found[0].text == "Some are long." and len({each.place for each in found}) == 2
    assert {each.place for each in search_texts(index, index.rows[0], 9)} == {"11", "12", "line 3"}
    asked = encoder.asked
    index_corpus(encoder, corpus)
    assert encoder.asked == asked and (tmp_path / "texts-visbio-index.safetensors").exists()
    assert index_corpus(encoder, corpus).entries[0]["corpus"]
    corpus.write_text('{"abstract": "With a\u2028line separator."}\n\n')
    assert len(index_corpus(encoder, corpus).entries) == 1
    corpus.write_text("{")
    with pytest.raises(ValueError, match="texts.jsonl line 1 is no JSON object"):
        index_corpus(encoder, corpus)
    corpus.write_text('{"pmid": 1}\n')
    with pytest.raises(ValueError, match="texts.jsonl holds no texts"):
        index_corpus(encoder, corpus)
