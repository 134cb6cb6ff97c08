"""The endless training stream: every position of it is known in advance, so it can start anywhere, on any process."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from visbio_diffusers.data.dataset import ImageDataset, UnreadableImage
from visbio_diffusers.data.sampler import SAMPLE, MixedSampler


logger = logging.getLogger(__name__)

RANDOM_FLIPS = ("none", "horizontal", "dihedral")
MAX_SKIPPED = 100  # unreadable images in a row, after which something else must be wrong


class _Batches(torch.utils.data.Dataset):
    """Micro-batches of one process by number; all that happens to a sample depends on (seed, position) alone."""

    def __init__(self, datasets, sampler, caption_fn, batch_size, seed, rank, world_size, random_flip, decode):
        self.datasets = datasets
        self.sampler = sampler
        self.caption_fn = caption_fn
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.random_flip = random_flip
        self.decode = decode
        # One generator for all samples, moved to the counter of each: nine times faster than seeding one for each.
        self.rng = np.random.Generator(np.random.Philox(key=[seed, SAMPLE]))
        self.rng_state = self.rng.bit_generator.state

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = number * self.world_size * self.batch_size + self.rank
        skipped: list[str] = []
        positions = range(first, first + self.world_size * self.batch_size, self.world_size)
        samples = [self._sample(position, skipped) for position in positions]
        images, labels, captions, orientations, sources = zip(*samples, strict=True)
        batch = {"captions": list(captions), "labels": list(labels), "sources": list(sources), "skipped": skipped}
        if not self.decode:
            return batch | {"orientations": np.array(orientations)}
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of sizes {sorted(sizes)} do not fit into one batch: give a resolution")
        images = flip_images(images, np.array(orientations), self.random_flip)
        pixel_values = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        return batch | {"pixel_values": pixel_values.div_(127.5).sub_(1.0)}  # (batch, channels, height, width)

    def _sample(self, position: int, skipped: list[str]) -> tuple[np.ndarray, Any, str, int, tuple[int, int]]:
        dataset_index, index = self.sampler.locate(position)
        dataset = self.datasets[dataset_index]
        index, item = _next_readable(dataset, index, skipped) if self.decode else (index, dataset.about(index))
        item = {**item, "index": index}
        self.rng_state["state"]["counter"][2] = position
        self.rng.bit_generator.state = self.rng_state
        orientation = int(self.rng.integers(8))  # drawn in any case, so that captions do not depend on the flips
        caption = self.caption_fn(dataset_index, item, self.rng)
        return item.get("image"), item["label"], caption, orientation, (dataset_index, index)


def _next_readable(dataset: ImageDataset, index: int, skipped: list[str]) -> tuple[int, dict[str, Any]]:
    """Return an item with its index, or the next one of the set that can be read; note what could not."""
    for _ in range(MAX_SKIPPED):
        try:
            return index, dataset[index]
        except UnreadableImage as error:
            skipped.append(str(error))
            index, last = (index + 1) % len(dataset), error
    raise ValueError(f"{MAX_SKIPPED} images in a row cannot be read, the last is {last}") from last


def flip_images(images: Sequence[np.ndarray], orientations: np.ndarray, random_flip: str) -> np.ndarray:
    """Return each image in that of its orientations which `random_flip` allows.

    Args:
        images (`Sequence[np.ndarray]`): each of shape `(height, width, channels)`.
        orientations (`np.ndarray` of shape `(batch,)`): 0 to 7; 0 leaves an image as it is.
        random_flip (`str`): "none", "horizontal" (left and right swapped where the orientation is odd), or "dihedral"
            (all eight: mirrored where it is odd, then turned by `orientation // 2` quarters; images must be square).
    """
    if random_flip == "none":
        return np.stack(images)
    flipped = [image[:, ::-1] if odd else image for image, odd in zip(images, orientations % 2)]
    if random_flip == "dihedral":
        flipped = [np.rot90(image, quarters) for image, quarters in zip(flipped, orientations // 2)]
    return np.stack(flipped)  # which is the only copy


def training_batches(
    datasets: Sequence[ImageDataset],
    weights: Sequence[float] | None,
    caption_fn: Callable[[int, dict[str, Any], np.random.Generator], str],
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    random_flip: str = "none",
    num_workers: int = 0,
    decode: bool = True,
) -> Iterator[dict[str, Any]]:
    """Return an endless iterator of micro-batches, which is the same whenever it is started again.

    In the place of an image in a shard that cannot be read comes the next one; a warning names it and counts.

    Args:
        datasets (`Sequence[ImageDataset]`): images of one size.
        weights (`Sequence[float]`, *optional*): share of each set; default is by length.
        caption_fn (`Callable`): `(index of the set, item, numpy generator) -> str`, see `caption_pools`; the item is
            that of the set, with its `index`.
        batch_size (`int`): samples per process and micro-batch.
        seed (`int`): of order, flips and captions.
        start (`int`): number of micro-batches that each process has already had.
        rank, world_size (`int`): this process, and how many share each global batch, in turns; together they see what
            one process of `world_size` times the batch size sees.
        random_flip (`str`): "none", "horizontal" or "dihedral", see `flip_images`.
        num_workers (`int`): processes that prepare batches; their number changes nothing else.
        decode (`bool`): `False` leaves the images to `ResidentImages`, of which all must be readable.

    Returns:
        dictionaries of `pixel_values` (float32 of shape `(batch, channels, height, width)` in [-1, 1]), `captions`
        (`list[str]`), `labels` (`list`) and `sources` (`list` of index of the set and index in it). Without decoding
        `orientations` (`np.ndarray` of shape `(batch,)`, see `flip_images`) stand in the place of `pixel_values`.

    Raises:
        ValueError: for weights that do not fit, unknown flips, or (from the iterator) images of different sizes.
    """
    if random_flip not in RANDOM_FLIPS:
        raise ValueError(f"random_flip={random_flip!r}: choose {', '.join(RANDOM_FLIPS)}")
    height, width = _next_readable(datasets[0], 0, [])[1]["image"].shape[:2]
    if random_flip == "dihedral" and height != width:
        raise ValueError(f"random_flip='dihedral' needs square images, not {height} x {width}: give a resolution")
    lengths, starts = [len(dataset) for dataset in datasets], [dataset.shard_starts for dataset in datasets]
    sampler = MixedSampler(lengths, weights, seed, shard_starts=starts)
    batches = _Batches(datasets, sampler, caption_fn, batch_size, seed, rank, world_size, random_flip, decode)
    if num_workers == 0:
        return _report_skipped(map(batches.__getitem__, itertools.count(start)))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(start),
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # the global one belongs to the training
    )
    return _report_skipped(iter(loader))


def _report_skipped(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Warn of each image that was left out, once, in the process that trains."""
    known: set[str] = set()
    for batch in batches:
        for reason in batch.pop("skipped"):
            if reason not in known:
                known.add(reason)
                logger.warning("left out, number %d: %s", len(known), reason)
        yield batch


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which saves first and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
