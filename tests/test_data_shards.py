"""Sets in shards: packed, read in any order, from here and elsewhere, and what is wrong with them said in one line."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers.cli import main
from visbio_diffusers.data import ImageDataset, caption_pools, load_image_dataset, training_batches
from visbio_diffusers.data.pack import Packing, pack_shards
from visbio_diffusers.data.sampler import LANES, MixedSampler, ShardOrder


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISBIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_set(num: int = 50, side: int = 8) -> ImageDataset:
    """Return a set whose images and captions differ."""
    images = np.random.default_rng(0).integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    labels, captions = np.arange(num) % 3, [f"a cell with {index} granules" for index in range(num)]
    subtypes = [None if index % 2 else "band" for index in range(num)]
    return ImageDataset("cells", "train", images, labels, captions, subtypes, ("a", "b", "c"), licence="CC0")


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a shard by hand, as another program would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def rows_of(dataset: ImageDataset) -> dict[str, dict]:
    return {dataset.captions[index]: dataset[index] for index in range(len(dataset))}


def own_caption(dataset_index, item, rng):
    return item["caption"]


def keys(num_batches: int, dataset: ImageDataset, **options) -> list[list[str]]:
    """Return the captions of batches."""
    batches = training_batches([dataset], None, own_caption, 4, 3, **options)
    return [batch["captions"] for batch in islice(batches, num_batches)]


def test_a_packed_set_is_the_set(tmp_path):
    original = make_set()
    manifest = pack_shards(original, tmp_path / "set" / "train", Packing(samples_per_shard=16), 2)
    assert manifest["num_samples"] == 50 and [e["num_samples"] for e in manifest["shards"]] == [16, 16, 16, 2]
    packed = load_image_dataset(str(tmp_path / "set"), "train")
    assert (packed.name, packed.licence, packed.class_names) == ("cells", "CC0", ("a", "b", "c"))
    assert packed.shard_starts.tolist() == [0, 16, 32, 48]
    expected, found = rows_of(original), rows_of(packed)
    assert expected.keys() == found.keys()
    for caption, item in expected.items():
        assert np.array_equal(item["image"], found[caption]["image"])
        assert (item["label"], item["subtype"]) == (found[caption]["label"], found[caption]["subtype"])
    assert "mask" not in packed[0]
    few = load_image_dataset(str(tmp_path / "set"), "train", max_samples=5, resolution=4)
    assert len(few) == 5 and few[0]["image"].shape == (4, 4, 3) and few.captions[0] in expected


def test_banks_multi_labels_and_real_files(tmp_path, visbio_data):
    blood = load_image_dataset(str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz"), "val", max_samples=40)
    pack_shards(blood, tmp_path / "blood" / "val", Packing(samples_per_shard=10), 1)
    packed = load_image_dataset(str(tmp_path / "blood"), "validation")
    assert packed.bank == "bloodmnist" and packed.captions is None and packed.licence == "CC BY 4.0"
    kinds = [Counter(zip(each.labels.tolist(), each.subtypes)) for each in (blood, packed)]
    assert kinds[0] == kinds[1]
    assert set(caption_pools([packed], 8, 0)[1]) == set(caption_pools([blood], 8, 0)[1])

    findings = ImageDataset("chest", "train", np.zeros((4, 8, 8), np.uint8), np.eye(4, 14, dtype=np.uint8))
    pack_shards(findings, tmp_path / "chest" / "train", Packing(), 1)
    labels = load_image_dataset(str(tmp_path / "chest"), caption_bank="chestmnist").labels
    assert sorted(labels.tolist()) == sorted(findings.labels.tolist())

    jpeg = load_image_dataset(str(visbio_data / "pbc64"), "test", max_samples=30)
    manifest = pack_shards(jpeg, tmp_path / "pbc" / "test", Packing(image_format="original"), 1)
    assert manifest["num_samples"] == 30
    packed = load_image_dataset(str(tmp_path / "pbc"), "test")
    assert {packed.images.encoded(i) for i in range(30)} == {jpeg.images.encoded(i) for i in range(30)}


def test_masks_stay_with_their_images(tmp_path, visbio_data):
    (tmp_path / "photographs").mkdir()
    for path in sorted((visbio_data / "dsb2018_cellpose").glob("00[0-9]_*.png")):
        (tmp_path / "photographs" / path.name).symlink_to(path)
    tiles = load_image_dataset(str(tmp_path / "photographs"))
    pack_shards(tiles, tmp_path / "tiles" / "train", Packing(samples_per_shard=20), 1)
    packed = load_image_dataset(str(tmp_path / "tiles"))
    expected = {item["image"].tobytes(): item for item in map(tiles.__getitem__, range(len(tiles)))}
    for index in range(len(packed)):
        item = packed[index]
        assert (
            np.array_equal(item["mask"], expected[item["image"].tobytes()]["mask"]) and item["mask"].dtype == np.uint16
        )
        assert item["caption"] == expected[item["image"].tobytes()]["caption"]
    small = load_image_dataset(str(tmp_path / "tiles"), resolution=32, max_samples=3)
    assert small[0]["mask"].shape == (32, 32) and small[0]["mask"].max() > 0


def test_other_programs_read_our_shards(tmp_path):
    import datasets

    pack_shards(make_set(10), tmp_path / "set" / "train", Packing(samples_per_shard=4), 1)
    files = sorted(str(path) for path in (tmp_path / "set" / "train").glob("*.tar"))
    table = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert sorted(table["txt"]) == sorted(make_set(10).captions)
    assert table[0]["json"].keys() >= {"label", "class_name"} and table[0]["png"].size == (8, 8)


def test_shards_of_other_programs(tmp_path, cache):
    members = {"a/1.png": png(), "a/1.txt": b" a monocyte \n", "a/2.PNG": png(9), "a/2.json": b'{"caption": "pink"}'}
    write_tar(tmp_path / "x" / "cells-0.tar", {"readme": b"see", **members, "a/3.npy": b"no image"})
    write_tar(tmp_path / "x" / "cells-1.tar", {"b.jpeg": png(), "b.left.png": b"another field", "b.txt": b"with dots"})
    pattern = str(tmp_path / "x" / "cells-{0..1}.tar")
    dataset = load_image_dataset(pattern)
    assert list(dataset.captions) == ["a monocyte", "pink", "with dots"] and dataset.name == "cells"
    assert len(list((cache / "indices").iterdir())) == 2
    stamps = {path: path.stat().st_mtime_ns for path in (cache / "indices").iterdir()}
    for name in (str(tmp_path / "x"), str(tmp_path / "x" / "*.tar"), pattern):
        assert list(load_image_dataset(name).captions) == list(dataset.captions)
    assert {path: path.stat().st_mtime_ns for path in (cache / "indices").iterdir()} == stamps  # not made again
    write_tar(tmp_path / "x" / "cells-1.tar", {"c.png": png(), "c.txt": b"another"})
    assert list(load_image_dataset(pattern).captions)[-1] == "another"  # a changed shard is read anew
    write_tar(tmp_path / "y" / "train-0.tar", {"1.png": png(), "1.cls": b"2", "2.png": png(), "2.cls": b"0"})
    assert load_image_dataset(str(tmp_path / "y"), caption_bank="bloodmnist").labels.tolist() == [2, 0]
    write_tar(
        tmp_path / "z" / "0.tar",
        {"1.png": png(), "1.json": b'{"label": "pus"}', "2.png": png(), "2.json": b'{"label": "bone"}'},
    )
    named = load_image_dataset(str(tmp_path / "z"))
    assert named.class_names == ("bone", "pus") and named.labels.tolist() == [1, 0] and named.captions is None


def test_order_of_shards_is_a_permutation_that_keeps_few_shards_open():
    sizes = np.random.default_rng(1).integers(1, 400, 300)
    starts, length = np.cumsum([0, *sizes[:-1]]), int(sizes.sum())
    order = ShardOrder(starts, length, [7, 1])
    items = [order[place] for place in range(length)]
    assert sorted(items) == list(range(length))
    assert [ShardOrder(starts, length, [7, 1])[place] for place in range(0, length, 97)] == items[::97]
    assert [ShardOrder(starts, length, [7, 2])[place] for place in range(200)] != items[:200]
    shards = np.searchsorted(starts, items, side="right") - 1
    assert np.abs(np.diff(items)).mean() > 1000  # neighbours in the order come from all over the set

    # Of four processes that take turns, each needs a quarter of the shards, but for those at the borders of lanes.
    for rank in range(4):
        assert len(set(shards[rank::4])) < 300 / 4 + LANES * 2


def test_windows_bound_how_many_shards_are_in_use():
    starts, length = np.arange(0, 1_000_000, 1000), 1_000_000
    order = ShardOrder(starts, length, [0])
    used = {order[place] // 1000 for place in range(500_000, 504_000)}
    assert len(used) <= LANES * (8192 // 1000 + 2)
    started = time.perf_counter()
    assert 0 <= ShardOrder(np.arange(0, 10**8, 10**4), 10**8, [0])[10**8 - 1] < 10**8
    assert time.perf_counter() - started < 1


def test_epochs_of_shards_on_processes_and_workers(tmp_path):
    pack_shards(make_set(48), tmp_path / "set" / "train", Packing(samples_per_shard=7), 1)
    dataset = load_image_dataset(str(tmp_path / "set"))
    straight = keys(24, dataset)
    for epoch in (straight[:12], straight[12:]):
        assert Counter(sum(epoch, [])) == Counter(make_set(48).captions)
    assert straight[:12] != straight[12:]
    assert keys(5, dataset, start=13, num_workers=2) == straight[13:18]  # in the middle of a shard
    halves = [keys(12, dataset, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(a + b) for a, b in zip(straight[::2], straight[1::2])]
    starts = [dataset.shard_starts, None]
    sampler = MixedSampler([48, 10], [0.5, 0.5], 0, shard_starts=starts)
    found = [item for index, item in map(sampler.locate, range(96)) if index == 0]
    assert sorted(found[:48]) == sorted(set(found[:48]))


def test_an_image_that_cannot_be_read_is_left_out_counted_and_named(tmp_path, caplog):
    members = {f"{index}.{suffix}": data for index in range(8) for suffix, data in
               (("png", png(index)), ("txt", f"cell {index}".encode()))}  # fmt: skip
    write_tar(tmp_path / "cells.tar", {**members, "3.png": png(3)[:40], "5.png": b"\x89PNG"})
    dataset = load_image_dataset(str(tmp_path / "cells.tar"), resolution=8)
    with caplog.at_level(logging.WARNING):
        seen = Counter(sum(keys(4, dataset), []))
    assert seen["cell 3"] == seen["cell 5"] == 0 and sum(seen.values()) == 16
    assert "left out, number 2: sample" in caplog.text and "number 3" not in caplog.text
    assert "sample 3 in" in caplog.text and "sample 5 in" in caplog.text and "cells.tar" in caplog.text
    write_tar(tmp_path / "none.tar", {"1.png": b"no", "1.txt": b"x"})
    with pytest.raises(ValueError, match="100 images in a row cannot be read, the last is sample 1 in"):
        load = load_image_dataset(str(tmp_path / "none.tar"))
        next(training_batches([load], None, own_caption, 4, 3))[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": png(), "1.json": b'{"label": 2.5}'}, "1 has the label 2.5: it is a name, a number from 0, or"),
        ({"1.png": png(), "1.json": b'{"label": true}'}, "1 has the label True"),
        ({"1.png": png(), "1.json": b'{"label": [300]}'}, r"1 has the label \[300\]"),
        ({"1.png": png(), "1.json": b'{"subtype": 3}'}, "1 has the subtype 3: it is a name"),
        ({"1.png": png(), "1.json": b"[" * 200_000}, "1 has a .json that is no object"),
        ({"Z\udce4hl.png": png()}, "the name .* is not UTF-8: rename the member"),
        ({"../../etc/1.png": png()}, r"member '\.\./\.\./etc/1\.png' leads out of the shard"),
        ({"/etc/1.png": png()}, "member '/etc/1.png' leads out of the shard"),
        ({"1.png": png(), "1.jpg": png()}, "1.jpg is a second image of one sample"),
        ({"1.png": png(), "1.txt": "Zählkammer".encode("latin-1")}, "1.txt is not UTF-8.*write it in UTF-8"),
        ({"1.png": png(), "1.json": b"[1]"}, "1 has a .json that is no object"),
        ({"1.png": png(), "1.cls": b"two"}, "or a .cls that is no number"),
        ({"1.txt": b"alone"}, "holds no images"),
        ({"1.png": png(), "2.png": png(), "2.txt": b"x"}, "1 of 2 images have no caption, the first is 1 in"),
        ({"1.png": png(), "1.cls": b"1", "2.png": png()}, "1 of 2 images of .* have no label"),
    ],
)
def test_bad_shards(members, message, tmp_path):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(path))


def test_links_cut_and_compressed_shards(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as file:
        member = tarfile.TarInfo("1.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(member)
    with pytest.raises(ValueError, match="leads out of the shard"):
        load_image_dataset(str(tmp_path / "link.tar"))
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(20)}).read_bytes()
    for length in (0, 100, 512 * 9 + 10, 512 * 20, 512 * 40):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.tar: it is cut short or no tar"):
            load_image_dataset(str(tmp_path / "cut.tar"))
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(ValueError, match="it is compressed: unpack it"):
        load_image_dataset(str(tmp_path / "packed.tar"))
    with pytest.raises(FileNotFoundError, match="no shard .*absent.tar"):
        load_image_dataset(str(tmp_path / "absent.tar"))


def test_packed_folders_that_are_not_whole(tmp_path):
    folder = tmp_path / "set" / "train"
    pack_shards(make_set(10), folder, Packing(samples_per_shard=4), 1)
    with pytest.raises(ValueError, match="has no split 'val': it has train"):
        load_image_dataset(str(tmp_path / "set"), "val")
    with pytest.raises(ValueError, match="was packed from another set or with other settings"):
        pack_shards(make_set(10), folder, Packing(samples_per_shard=5), 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    with (folder / "000001.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="000001.tar is missing, or not as long as manifest.json says"):
        load_image_dataset(str(tmp_path / "set"))
    pack_shards(make_set(10), folder, Packing(samples_per_shard=4), 1)  # writes that one again, and the same
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(ValueError, match="not packed to its end"):
        load_image_dataset(str(tmp_path / "set"))
    manifest["shards"][0]["file"] = "../000000.tar"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="it names the file"):
        load_image_dataset(str(tmp_path / "set"))


def test_packing_goes_on_where_it_was_killed(tmp_path):
    code = (
        "import sys, time; import numpy as np; from visbio_diffusers.data import ImageDataset, pack\n"
        "class Slow(ImageDataset):\n"
        "    def _image(self, index):\n"
        "        time.sleep(0.02); return super()._image(index)\n"
        "images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)\n"
        "dataset = Slow('cells', 'train', images, captions=[str(index) for index in range(60)])\n"
        "pack.pack_shards(dataset, sys.argv[1], pack.Packing(samples_per_shard=10), int(sys.argv[2]))\n"
    )
    folder = tmp_path / "killed"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), "2"], start_new_session=True, stderr=subprocess.DEVNULL
    )
    manifest = folder / "manifest.json"
    while not manifest.exists() or len(json.loads(manifest.read_text())["shards"]) < 2:
        assert running.poll() is None
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    entries = json.loads(manifest.read_text())["shards"]
    stamps = {entry["file"]: (folder / entry["file"]).stat().st_mtime_ns for entry in entries}
    assert 2 <= len(stamps) < 6, "the kill came too late to test anything"
    for name in ("killed", "straight"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), "1"], check=True, stderr=subprocess.DEVNULL)
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    digests = [
        [entry["sha256"] for entry in json.loads((tmp_path / name / "manifest.json").read_text())["shards"]]
        for name in ("killed", "straight")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 6
    assert {path.suffix for path in folder.iterdir()} == {".tar", ".arrow", ".json", ""}  # "" is .lock


@pytest.fixture
def server(tmp_path):
    """Serve a folder on the loopback interface, and count what is asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "served").mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served")))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()


def test_remote_shards_come_when_they_are_needed_and_leave_when_room_is(tmp_path, cache, server, monkeypatch):
    address, asked = server
    pack_shards(make_set(40), tmp_path / "served" / "train", Packing(samples_per_shard=10), 1)
    dataset = load_image_dataset(f"{address}/{{split}}/manifest.json")
    assert len(dataset) == 40 and not any(path.endswith(".tar") for path in asked)
    dataset[0]
    assert [path for path in asked if path.endswith(".tar")] == ["/train/000000.tar"]
    assert Counter(sum(keys(10, dataset), [])) == Counter(make_set(40).captions)
    assert sum(path.endswith(".tar") for path in asked) == 4

    size = (tmp_path / "served" / "train" / "000000.tar").stat().st_size
    monkeypatch.setenv("VISBIO_CACHE_GB", str(2.5 * size / 2**30))
    monkeypatch.setenv("VISBIO_CACHE", str(tmp_path / "small"))
    dataset = load_image_dataset(f"{address}/train/manifest.json")
    assert Counter(sum(keys(20, dataset), [])) == Counter(make_set(40).captions * 2)
    assert len(list((tmp_path / "small" / "shards").glob("*.tar"))) <= 2

    (tmp_path / "served" / "train" / "000001.tar").write_bytes(b"\0" * size)
    monkeypatch.setenv("VISBIO_CACHE", str(tmp_path / "third"))
    with pytest.raises(OSError, match="000001.tar has another SHA-256 than its manifest says"):
        load_image_dataset(f"{address}/train/manifest.json")[10]
    with pytest.raises(OSError, match="404"):
        load_image_dataset(f"{address}/test/manifest.json")


def test_remote_shards_without_a_manifest(tmp_path, server):
    address, asked = server
    for number in range(3):
        write_tar(tmp_path / "served" / f"c-{number}.tar", {"1.png": png(number), "1.txt": f"{number}".encode()})
    assert list(load_image_dataset(f"{address}/c-{{0..2}}.tar").captions) == ["0", "1", "2"]
    count = len(asked)
    assert load_image_dataset(f"{address}/c-{{0..2}}.tar")[2]["image"][0, 0].tolist() == [2, 0, 0]
    assert len(asked) == count  # all of it is here
    with pytest.raises(ValueError, match="put {split} into the address"):
        load_image_dataset(f"{address}/c-{{0..2}}.tar", "val")


def test_a_set_packed_again_is_not_mixed_with_what_is_kept_of_it(tmp_path, server):
    address, _ = server
    folder, other = tmp_path / "served" / "train", make_set(20)
    pack_shards(make_set(20), folder, Packing(samples_per_shard=10), 1)
    first = load_image_dataset(f"{address}/train/manifest.json")
    assert np.array_equal(first[0]["image"], rows_of(make_set(20))[first.captions[0]]["image"])
    shutil.rmtree(folder)
    other = replace(other, images=other.images[::-1].copy(), captions=[f"new {row}" for row in range(20)])
    pack_shards(other, folder, Packing(samples_per_shard=10), 1)
    second = load_image_dataset(f"{address}/train/manifest.json")
    expected = rows_of(other)
    assert all(np.array_equal(second[row]["image"], expected[second.captions[row]]["image"]) for row in range(20))


def test_a_manifest_leads_to_no_shell_and_to_no_file_elsewhere(tmp_path):
    pack_shards(make_set(4), tmp_path / "m", Packing(), 1)
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    with pytest.raises(ValueError, match="would be read through a shell, and what it names too"):
        load_image_dataset(f"pipe:cat {tmp_path}/m/manifest.json", allow_pipe=True)
    (tmp_path / "m" / "manifest.json").write_text(json.dumps({**manifest, "bank": "/etc/passwd.yaml"}))
    assert load_image_dataset(str(tmp_path / "m" / "manifest.json")).bank is None
    for wrong in ({**manifest, "split": None}, {"shards": 3}, {**manifest, "shards": [{"file": "x;touch y;.tar"}]}):
        (tmp_path / "m" / "manifest.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="no manifest of shards|has no split"):
            load_image_dataset(str(tmp_path / "m" / "manifest.json"))


def test_no_other_split_is_taken_for_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cells-train-0", "cells-val-0"):
        write_tar(tmp_path / "flat" / f"{name}.tar", {"1.png": png(), "1.txt": name.encode()})
    assert list(load_image_dataset("flat").captions) == ["cells-train-0"]
    assert list(load_image_dataset("flat", "validation").captions) == ["cells-val-0"]
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_image_dataset("flat", "test")
    for name in ("flat/*.tar", "./flat/cells-train-0.tar", str(tmp_path / "flat" / "cells-train-{0..0}.tar")):
        with pytest.raises(ValueError, match="put {split} into the address to have 'val' too"):
            load_image_dataset(name, "val")
    assert list(load_image_dataset("flat/cells-{split}-0.tar", "val").captions) == ["cells-val-0"]
    pack_shards(replace(make_set(4), split="validation"), tmp_path / "v" / "validation", Packing(), 1)
    for split in ("val", "validation"):
        assert len(load_image_dataset("v", split)) == len(load_image_dataset("v/{split}/manifest.json", split)) == 4


def test_folders_that_only_look_like_shards(tmp_path):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cell"}')
    (tmp_path / "images" / "manifest.json").write_text("{}")
    write_tar(folder / "raw.tar", {"notes.txt": b"kept beside"})
    assert load_image_dataset(str(tmp_path / "images"), cache_dir=tmp_path / "hf").captions == ["a cell"]


def test_what_a_packing_was_made_of_is_known(tmp_path):
    pack_shards(make_set(10), tmp_path / "p", Packing(), 1)
    changed = replace(make_set(10), captions=[f"another {row}" for row in range(10)])
    with pytest.raises(ValueError, match="was packed from another set or with other settings: choose another folder"):
        pack_shards(changed, tmp_path / "p", Packing(), 1)


def test_files_that_cannot_be_packed_are_named(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(5):
        (folder / f"{row}.png").write_bytes(png(row))
    Image.new("RGB", (8, 8)).save(folder / "5.jp2")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "PNG")
    (folder / "6.png").write_bytes(whole.getvalue()[:5000])
    lines = [json.dumps({"file_name": path.name, "text": path.stem}) for path in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = load_image_dataset(str(folder), cache_dir=tmp_path / "hf")
    manifest = pack_shards(images, tmp_path / "p", Packing(samples_per_shard=1, image_format="original"), 1)
    left_out = sum((entry["left_out"] for entry in manifest["shards"]), [])
    assert manifest["num_samples"] == 6 and len(left_out) == 1 and "6.png" in left_out[0]
    assert sorted(load_image_dataset(str(tmp_path / "p")).captions) == list("012345")


def test_a_small_cache_that_readers_share(tmp_path, server, monkeypatch):
    address, _ = server
    pack_shards(make_set(60), tmp_path / "served" / "train", Packing(samples_per_shard=5), 2)
    size = (tmp_path / "served" / "train" / "000000.tar").stat().st_size
    monkeypatch.setenv("VISBIO_CACHE_GB", str(3 * size / 2**30))
    sets = [load_image_dataset(f"{address}/train/manifest.json") for _ in range(3)]
    failed = []

    def read(dataset, seed):
        try:
            for row in np.random.default_rng(seed).permutation(60):
                assert dataset[int(row)]["caption"] in make_set(60).captions
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(dataset, seed)) for seed, dataset in enumerate(sets)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed
    monkeypatch.setenv("VISBIO_CACHE_GB", "50GB")
    with pytest.raises(ValueError, match="VISBIO_CACHE_GB=50GB is no number of gigabytes"):
        load_image_dataset(f"{address}/train/manifest.json")


def test_a_shell_runs_only_where_it_is_allowed(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"1.png": png(), "1.txt": b"piped"})
    with pytest.raises(ValueError, match="would run a shell on this machine: allow it with --allow_pipe"):
        load_image_dataset(f"pipe:touch {tmp_path}/ran; cat {path}")
    assert not (tmp_path / "ran").exists()
    assert list(load_image_dataset(f"pipe:cat {tmp_path}/{{0..0}}.tar", allow_pipe=True).captions) == ["piped"]
    with pytest.raises(OSError, match="ended with code 1: cat: .*absent"):
        load_image_dataset("pipe:cat absent", allow_pipe=True)


def test_command_packs_what_can_be_trained_on(tmp_path, capsys, visbio_data):
    flags = ("--split", "val", "--output", str(tmp_path / "out"), "--samples-per-shard", "1000", "--num-workers", "2")
    assert main(["data", "shards", str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz"), *flags]) == 0
    assert f"1712 images in 2 shards: {tmp_path / 'out' / 'val'}" in capsys.readouterr().out
    assert len(load_image_dataset(str(tmp_path / "out"), "val")) == 1712
    assert main(["data", "shards", str(tmp_path / "absent"), "--output", str(tmp_path / "o")]) == 1
    assert not (tmp_path / "o").exists()


LAUNCHED = """
import json, os, runpy, sys, time
script = runpy.run_path(sys.argv[1])
fit = script["fit"]

def noting_fit(accelerator, model, optimizer, lr_scheduler, stream, *rest):
    def noted(start):
        for number, batch in enumerate(stream(start), start):
            with open(f"seen-{accelerator.process_index}.jsonl", "a") as file:
                file.write(json.dumps([number, batch["sources"][:, 1].tolist()]) + "\\n")
            yield batch
    return fit(accelerator, model, optimizer, lr_scheduler, noted, *rest)

script["main"].__globals__["fit"] = noting_fit
script["main"](script["parse"](script["TextToImageConfig"], script["PRESETS"], sys.argv[2:]))
os._exit(0)  # taking two processes down has been seen to hang in gloo
"""


def test_cellpose_to_tiles_to_shards_to_a_training_that_sees_each_tile_once(
    tmp_path, visbio_data, tiny_pipeline_dir, monkeypatch
):
    """On two processes, killed within an epoch and resumed: none is lost, and none comes twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    for path in sorted((visbio_data / "dsb2018_cellpose").glob("0[0-2]*_*.png")):
        (tmp_path / "photographs" / path.name).symlink_to(path)
    assert main(["data", "shards", "photographs", "--output", "tiles", "--samples-per-shard", "50"]) == 0
    num = json.loads(Path("tiles/train/manifest.json").read_text())["num_samples"]
    batch = next(size for size in range(8, 0, -1) if num // 2 % size == 0)
    steps = num // 2 // batch + 4  # a whole epoch, and a little of the next
    Path("launched.py").write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "launched.py"]
    command = [
        *(*launch, str(ROOT / "train_scripts" / "train_text_to_image.py"), "--preset", "tiny", "--output_dir", "run"),
        *("--dataset_name", "tiles", "--text_encoder", str(tiny_pipeline_dir), "--resolution", "8"),
        *("--train_batch_size", str(batch), "--max_train_samples", "0", "--max_train_steps", str(steps)),
        *("--checkpointing_steps", "10", "--dataloader_num_workers", "1"),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "start_new_session": True, "stdout": subprocess.DEVNULL}
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    while not Path("run/checkpoint-0000010").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not Path("run/pipeline").exists(), "the kill came too late to test anything"
    done = subprocess.run(
        [*command, "--resume_from_checkpoint", "latest"], stderr=subprocess.PIPE, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]

    seen: dict[tuple[int, int], list[int]] = {}
    for rank in (0, 1):
        for number, rows in map(json.loads, Path(f"seen-{rank}.jsonl").read_text().splitlines()):
            assert seen.setdefault((number, rank), rows) == rows  # what was taken again after the kill is the same
    assert set(seen) >= {(number, rank) for number in range(steps) for rank in (0, 1)}
    epoch = [row for number in range(num // 2 // batch) for rank in (0, 1) for row in seen[number, rank]]
    assert len(epoch) == num - num % 2 and max(Counter(epoch).values()) == 1
