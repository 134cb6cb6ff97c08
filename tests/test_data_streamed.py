"""Parquet and Hub sets read file by file: the same images as when they are loaded, and nothing that is not needed."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from visbio_diffusers.data import load_image_dataset, training_batches


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISBIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three parquet files as `datasets` writes them."""
    (tmp_path / "served").mkdir()
    for part in range(3):
        rows = range(part * 10, part * 10 + 10)
        images = [Image.fromarray(np.full((8, 8, 3), row, np.uint8)) for row in rows]
        columns = {"image": images, "text": [f"cell {row}" for row in rows], "label": [row % 2 for row in rows]}
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["a", "b"]),
            }
        )
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "served" / f"train-{part}.parquet")
    return tmp_path / "served"


def test_equals_the_set_that_is_loaded(visbio_data):
    options = {"caption_bank": "bloodmnist", "resolution": 28}
    loaded = load_image_dataset(str(visbio_data / "pbc64"), "test", **options)
    streamed = load_image_dataset(str(visbio_data / "pbc64"), "test", streaming=True, **options)
    assert np.array_equal(loaded.labels, streamed.labels) and list(loaded.subtypes) == list(streamed.subtypes)
    assert (loaded.class_names, loaded.name) == (streamed.class_names, streamed.name)
    for row in range(0, len(loaded), 171):
        assert np.array_equal(loaded[row]["image"], streamed[row]["image"])


def test_files_of_a_folder_are_shards(folder):
    dataset = load_image_dataset(str(folder), streaming=True)
    assert dataset.shard_starts.tolist() == [0, 10, 20] and dataset.class_names == ("a", "b")
    assert [dataset[row]["image"][0, 0, 0] for row in (0, 11, 29)] == [0, 11, 29]
    stream = training_batches([dataset], None, lambda _, item, rng: item["caption"], 6, 0)
    seen = [caption for batch in islice(stream, 10) for caption in batch["captions"]]
    assert Counter(seen) == Counter([f"cell {row}" for row in range(30)] * 2)
    stream = training_batches([dataset], None, lambda _, item, rng: item["caption"], 6, 0, start=7, num_workers=2)
    assert next(stream)["captions"] == seen[42:48]
    with pytest.raises(ValueError, match="has no split 'val': it has train"):
        load_image_dataset(str(folder), "val", streaming=True)
    with pytest.raises(ValueError, match="no column 'photo', only image, text, label: choose --image_column"):
        load_image_dataset(str(folder), streaming=True, image_column="photo")


def test_files_of_a_web_server_come_and_go(folder, cache, monkeypatch):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_port}/train-1.parquet"
    dataset = load_image_dataset(address, streaming=True)
    assert list(dataset.captions)[:2] == ["cell 10", "cell 11"] and dataset[3]["image"][0, 0, 0] == 13
    assert [path.suffix for path in (cache / "shards").iterdir() if path.suffix != ".lock"] == [".arrow"]
    httpd.shutdown()
    httpd.server_close()
    assert load_image_dataset(address, streaming=True)[4]["image"][0, 0, 0] == 14  # all of it is here


def test_images_that_cannot_be_read_are_left_out(folder, caplog):
    table = parquet.read_table(folder / "train-0.parquet").to_pylist()
    table[4]["image"]["bytes"] = table[4]["image"]["bytes"][:50]
    datasets.Dataset.from_list(table).to_parquet(folder / "train-0.parquet")
    dataset = load_image_dataset(str(folder / "train-0.parquet"), streaming=True)
    stream = training_batches([dataset], None, lambda _, item, rng: item["caption"], 5, 0)
    assert "cell 4" not in [caption for batch in islice(stream, 2) for caption in batch["captions"]]
    assert "left out, number 1: sample row 4 in" in caplog.text
    (folder / "cut.parquet").write_bytes((folder / "train-1.parquet").read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot read .*cut.parquet.*: get it again"):
        load_image_dataset(str(folder / "cut.parquet"), streaming=True)
