"""The training stream: epochs without loss, exact weights, and the same batches wherever and however it is started."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from visbio_diffusers.data import ImageDataset, MixedSampler, caption_pools, load_image_dataset, training_batches
from visbio_diffusers.data.mixture import flip_images


def make_set(num: int, side: int = 4, value: int | None = None) -> ImageDataset:
    """Return a set whose images differ; label and caption are the index."""
    rng = np.random.default_rng(num)
    images = rng.integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    if value is not None:
        images[:] = value
    return ImageDataset(f"set{num}", "train", images, np.arange(num), [f"caption {i}" for i in range(num)])


def noisy_caption(dataset_index: int, item: dict, rng: np.random.Generator) -> str:
    return f"{dataset_index} {item['label']} {rng.integers(1000)}"


def take(num: int, datasets=None, **options) -> list[dict]:
    options = {"weights": None, "caption_fn": noisy_caption, "batch_size": 4, "seed": 3, **options}
    return list(islice(training_batches(datasets or [make_set(10)], **options), num))


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["captions"], one["labels"]) == (other["captions"], other["labels"])


def test_every_item_once_per_epoch_and_each_epoch_in_its_own_order():
    sampler = MixedSampler([7], None, seed=0)
    epochs = [[sampler.locate(position)[1] for position in range(e * 7, e * 7 + 7)] for e in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    fresh = MixedSampler([7], None, seed=0)
    assert [fresh.locate(position)[1] for position in reversed(range(42))] == [i for e in epochs for i in e][::-1]
    assert [MixedSampler([7], None, seed=1).locate(i)[1] for i in range(7)] != epochs[0]
    assert [MixedSampler([7], None, 0, shuffle=False).locate(i)[1] for i in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_weights_hold_exactly_in_every_block_and_each_set_runs_in_epochs():
    sampler = MixedSampler([30, 50, 11], [1.0, 1.0, 1.0], seed=5)
    located = [sampler.locate(position) for position in range(3000)]
    for block in range(3):
        counts = Counter(index for index, _ in located[block * 1000 : block * 1000 + 1000])
        assert counts == {0: 334, 1: 333, 2: 333}
    for index, length in enumerate((30, 50, 11)):
        items = [item for owner, item in located if owner == index]
        for epoch in range(len(items) // length):
            assert sorted(items[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert len({tuple(owner for owner, _ in located[b * 1000 : b * 1000 + 1000]) for b in range(3)}) == 3
    assert max(len(run) for run in "".join(str(owner) for owner, _ in located).split("0")) < 50  # mixed, not in turns


def test_any_position_is_reached_at_once():
    sampler = MixedSampler([5, 100], [0.7, 0.3], seed=0)
    started = time.perf_counter()
    assert sampler.locate(10**12)[1] >= 0
    assert time.perf_counter() - started < 0.5
    fresh = MixedSampler([5, 100], [0.7, 0.3], seed=0)
    order = np.random.default_rng(0).permutation(4000)[:300]
    assert [fresh.locate(int(p)) for p in order] == [sampler.locate(int(p)) for p in order]


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([3, 4], [1.0], "1 dataset weights for 2 datasets"),
        ([3, 4], [1.0, 0.0], "leave a set out"),
        ([3, 4], [1.0, -1.0], "positive"),
        ([3, 4], [1.0, float("nan")], "positive"),
        ([3, 4], [1.0, 1e-5], "never be drawn"),
        ([3, 0], None, "at least one"),
        ([], None, "at least one"),
    ],
)
def test_bad_weights(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        MixedSampler(lengths, weights, seed=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_restart_gives_identical_batches(num_workers):
    sets = [make_set(10), make_set(33)]
    options = {"datasets": sets, "weights": [0.7, 0.3], "random_flip": "dihedral"}
    straight = take(300, **options)
    state = torch.get_rng_state()
    for start in (0, 1, 249):  # 249 lies just before the second block of 1,000 samples
        assert_same(take(4, **options, start=start, num_workers=num_workers), straight[start : start + 4])
    assert torch.equal(torch.get_rng_state(), state)  # the training's own draws are left alone
    assert not torch.equal(straight[0]["pixel_values"], take(1, **options, start=250)[0]["pixel_values"])


def test_processes_share_the_batches_of_one():
    options = {"datasets": [make_set(10)], "random_flip": "dihedral"}
    whole = take(6, **options, batch_size=4)
    parts = [take(6, **options, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch["pixel_values"][0::2], first["pixel_values"])
        assert torch.equal(batch["pixel_values"][1::2], second["pixel_values"])
        assert (batch["captions"][0::2], batch["captions"][1::2]) == (first["captions"], second["captions"])


def test_pixel_values_and_flips():
    dataset = make_set(6)
    plain = take(1, [dataset], batch_size=6)[0]
    assert plain["pixel_values"].dtype == torch.float32
    assert plain["pixel_values"].is_contiguous()
    images = torch.from_numpy(dataset.images[plain["labels"]]).permute(0, 3, 1, 2)
    assert torch.allclose((plain["pixel_values"] + 1) * 127.5, images.float(), atol=1e-4)
    assert take(1, [make_set(2, value=255)])[0]["pixel_values"].unique().tolist() == [1.0]
    assert take(1, [make_set(2, value=0)])[0]["pixel_values"].unique().tolist() == [-1.0]
    for random_flip, allowed in (("horizontal", 2), ("dihedral", 8)):
        batches = take(100, [make_set(1)], random_flip=random_flip)
        seen = Counter(image.numpy().tobytes() for batch in batches for image in batch["pixel_values"])
        assert len(seen) == allowed
        assert min(seen.values()) > 0.6 * 400 / allowed
        assert [b["captions"] for b in batches] == [b["captions"] for b in take(100, [make_set(1)])]


def test_flips_are_the_eight_orientations_of_a_square():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    flipped = flip_images(np.stack([image] * 8), np.arange(8), "dihedral")
    wanted = {np.rot90(side, k).tobytes() for side in (image, image[:, ::-1]) for k in range(4)}
    assert {one.tobytes() for one in flipped} == wanted
    assert np.array_equal(flipped[0], image)
    assert np.array_equal(flip_images(image[None], np.array([3]), "horizontal")[0], image[:, ::-1])
    assert np.array_equal(flipped[2], np.rot90(image))


def test_a_new_process_draws_the_same_batches(visbio_data):
    path = str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz")
    code = (
        "import hashlib, itertools\n"
        "from visbio_diffusers.data import caption_pools, load_image_dataset, training_batches\n"
        f"dataset = load_image_dataset({path!r}, 'val')\n"
        "caption_fn = caption_pools([dataset], 64, 0)[0]\n"
        "stream = training_batches([dataset], None, caption_fn, 64, 0, 20, random_flip='dihedral')\n"
        "digest = hashlib.sha256()\n"
        "for batch in itertools.islice(stream, 10):\n"
        "    digest.update(batch['pixel_values'].numpy().tobytes() + repr(batch['captions']).encode())\n"
    )
    names: dict = {}
    exec(code, names)  # the same lines here and in the other process
    ended = subprocess.run(
        [sys.executable, "-c", code + "print(digest.hexdigest())"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == names["digest"].hexdigest()
    assert names["digest"].hexdigest() != hashlib.sha256().hexdigest()


def test_images_that_make_no_batch():
    wide = ImageDataset("wide", "train", np.zeros((4, 8, 6, 3), np.uint8), captions=["x"] * 4)
    with pytest.raises(ValueError, match=r"\(4, 4\), \(8, 6\).*give a resolution"):
        take(1, [make_set(4), wide])
    with pytest.raises(ValueError, match="needs square images, not 8 x 6"):
        take(1, [wide], random_flip="dihedral")
    with pytest.raises(ValueError, match="random_flip='vertical': choose none, horizontal, dihedral"):
        take(1, [wide], random_flip="vertical")
    with pytest.raises(ValueError, match="mine has no captions: choose with --caption_column"):
        caption_pools([ImageDataset("mine", "train", wide.images)], 64, 0)[0]


def test_throughput_in_memory():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4096, 28, 28, 3), dtype=np.uint8)
    dataset = ImageDataset("set", "train", images, captions=["x"] * len(images))
    stream = training_batches([dataset], None, caption_pools([dataset], 64, 0)[0], 64, 0, random_flip="dihedral")
    next(stream)
    started = time.process_time()
    for batch in islice(stream, 60):
        assert batch["pixel_values"].shape == (64, 3, 28, 28)
    assert 60 * 64 / (time.process_time() - started) > 2500  # 5,000 a second and more on an idle thread


def test_real_sets_mixed_by_weight(visbio_data):
    names = ("bloodmnist_rebuilt_28.npz", "pneumoniamnist_rebuilt_28.npz")
    sets = [load_image_dataset(str(visbio_data / "medmnist" / name), "val", resolution=32) for name in names]
    batches = list(islice(training_batches(sets, [0.7, 0.3], caption_pools(sets, 64, 0)[0], 50, 0), 20))
    assert {batch["pixel_values"].shape for batch in batches} == {(50, 3, 32, 32)}
    grey = sum(bool((image == image[:1]).all()) for batch in batches for image in batch["pixel_values"])
    assert grey == 300
    assert len({caption for batch in batches for caption in batch["captions"]}) > 500
