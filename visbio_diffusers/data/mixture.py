"""The endless training stream: every position of it is known in advance, so it can start anywhere, on any process."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from visbio_diffusers.data.dataset import ImageDataset


BLOCK = 1000  # positions over which the weights hold exactly
RANDOM_FLIPS = ("none", "horizontal", "dihedral")

# First words of the random streams, so that none repeats another.
_EPOCH, _BLOCK, _SAMPLE = range(3)


class MixedSampler:
    """The order in which the items of several sets are seen, as a function of the position alone.

    A single set is seen in epochs: each is a permutation of its own, drawn from (seed, epoch), and nothing is dropped.
    Several sets share blocks of 1,000 positions by weight (largest remainder), shuffled from (seed, block); within its
    share each set runs through its own epochs.

    Args:
        lengths (`Sequence[int]`): number of items of each set.
        weights (`Sequence[float]`, *optional*): share of each set, in any unit; default is the lengths.
        seed (`int`): not negative.
        shuffle (`bool`): `False` keeps the items in their order.

    Raises:
        ValueError: for empty sets, and weights that do not fit, are not positive, or below 1 in 1,000.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None, seed: int, shuffle: bool = True):
        """Share out one block; nothing is drawn yet."""
        self.lengths = list(lengths)
        self.seed = seed
        self.shuffle = shuffle
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"sets of {self.lengths} images: each needs at least one")
        self.counts = _block_counts(self.lengths if weights is None else list(weights), len(self.lengths))
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Return (index of the set, index of its item) at a position counted from 0."""
        if len(self.lengths) == 1:
            return 0, self._item(0, position)
        block, place = divmod(position, BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._draw_block(block))
        _, sets, ranks = self._block
        index = int(sets[place])
        return index, self._item(index, block * self.counts[index] + int(ranks[place]))

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each place of a block, its set and how many of that set come before it within the block."""
        sets = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng([self.seed, _BLOCK, block]).shuffle(sets)
        ranks = np.empty(BLOCK, dtype=np.int64)
        for index, count in enumerate(self.counts):
            ranks[sets == index] = np.arange(count)
        return sets, ranks

    def _item(self, index: int, position: int) -> int:
        epoch, place = divmod(position, self.lengths[index])
        if not self.shuffle:
            return place
        if self._epochs.get(index, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, _EPOCH, index, epoch]).permutation(self.lengths[index])
            self._epochs[index] = (epoch, order)
        return int(self._epochs[index][1][place])


def _block_counts(weights: list[float], num_sets: int) -> list[int]:
    """Share out one block by largest remainder."""
    if len(weights) != num_sets:
        raise ValueError(f"{len(weights)} dataset weights for {num_sets} datasets: give one each")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"dataset weights {weights}: each must be a positive number, leave a set out instead of 0")
    exact = BLOCK * np.asarray(weights, dtype=np.float64) / np.sum(weights)
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[index] += 1
    if counts.min() == 0:
        raise ValueError(f"dataset weights {weights}: the smallest is below 1 in {BLOCK} and would never be drawn")
    return counts.tolist()


class _Batches(torch.utils.data.Dataset):
    """Micro-batches of one process by number; all that happens to a sample depends on (seed, position) alone."""

    def __init__(self, datasets, sampler, caption_fn, batch_size, seed, rank, world_size, random_flip):
        self.datasets = datasets
        self.sampler = sampler
        self.caption_fn = caption_fn
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.random_flip = random_flip
        # One generator for all samples, moved to the counter of each: nine times faster than seeding one for each.
        self.rng = np.random.Generator(np.random.Philox(key=[seed, _SAMPLE]))
        self.rng_state = self.rng.bit_generator.state

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = (number * self.world_size + self.rank) * self.batch_size
        samples = map(self._sample, range(first, first + self.batch_size))
        images, labels, captions, orientations, sources = zip(*samples, strict=True)
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of sizes {sorted(sizes)} do not fit into one batch: give a resolution")
        images = flip_images(np.stack(images), np.array(orientations), self.random_flip)
        pixel_values = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        return {
            "pixel_values": pixel_values.div_(127.5).sub_(1.0),  # (batch, channels, height, width)
            "captions": list(captions),
            "labels": list(labels),
            "sources": list(sources),
        }

    def _sample(self, position: int) -> tuple[np.ndarray, Any, str, int, tuple[int, int]]:
        dataset_index, index = self.sampler.locate(position)
        item = {**self.datasets[dataset_index][index], "index": index}
        self.rng_state["state"]["counter"][2] = position
        self.rng.bit_generator.state = self.rng_state
        orientation = int(self.rng.integers(8))  # drawn in any case, so that captions do not depend on the flips
        caption = self.caption_fn(dataset_index, item, self.rng)
        return item["image"], item["label"], caption, orientation, (dataset_index, index)


def flip_images(images: np.ndarray, orientations: np.ndarray, random_flip: str) -> np.ndarray:
    """Return each image in that of its orientations which `random_flip` allows.

    Args:
        images (`np.ndarray` of shape `(batch, height, width, channels)`).
        orientations (`np.ndarray` of shape `(batch,)`): 0 to 7; 0 leaves an image as it is.
        random_flip (`str`): "none", "horizontal" (left and right swapped where the orientation is odd), or "dihedral"
            (all eight: mirrored where it is odd, then turned by `orientation // 2` quarters; images must be square).
    """
    if random_flip == "none":
        return images
    flipped = images.copy()
    flipped[orientations % 2 == 1] = images[orientations % 2 == 1, :, ::-1]
    if random_flip == "dihedral":
        for quarters in (1, 2, 3):
            turned = orientations // 2 == quarters
            flipped[turned] = np.rot90(flipped[turned], quarters, axes=(1, 2))
    return flipped


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
) -> Iterator[dict[str, Any]]:
    """Return an endless iterator of micro-batches, which is the same whenever it is started again.

    Args:
        datasets (`Sequence[ImageDataset]`): images of one size.
        weights (`Sequence[float]`, *optional*): share of each set; default is by length.
        caption_fn (`Callable`): `(index of the set, item, numpy generator) -> str`, see `caption_pools`; the item is
            that of the set, with its `index`.
        batch_size (`int`): samples per process and micro-batch.
        seed (`int`): of order, flips and captions.
        start (`int`): number of micro-batches that each process has already had.
        rank, world_size (`int`): this process, and how many share each global batch; together they see what one
            process of `world_size` times the batch size sees.
        random_flip (`str`): "none", "horizontal" or "dihedral", see `flip_images`.
        num_workers (`int`): processes that prepare batches; their number changes nothing else.

    Returns:
        dictionaries of `pixel_values` (float32 of shape `(batch, channels, height, width)` in [-1, 1]), `captions`
        (`list[str]`), `labels` (`list`) and `sources` (`list` of index of the set and index in it).

    Raises:
        ValueError: for weights that do not fit, unknown flips, or (from the iterator) images of different sizes.
    """
    if random_flip not in RANDOM_FLIPS:
        raise ValueError(f"random_flip={random_flip!r}: choose {', '.join(RANDOM_FLIPS)}")
    height, width = datasets[0][0]["image"].shape[:2]
    if random_flip == "dihedral" and height != width:
        raise ValueError(f"random_flip='dihedral' needs square images, not {height} x {width}: give a resolution")
    sampler = MixedSampler([len(dataset) for dataset in datasets], weights, seed)
    batches = _Batches(datasets, sampler, caption_fn, batch_size, seed, rank, world_size, random_flip)
    if num_workers == 0:
        return map(batches.__getitem__, itertools.count(start))
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=itertools.count(start),
            num_workers=num_workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # the global one belongs to the training
        )
    )


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which saves first and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
