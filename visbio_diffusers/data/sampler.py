"""The order in which images are seen, as a function of the position alone: it can start anywhere, on any process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


BLOCK = 1000  # positions over which the weights hold exactly
LANES = 16  # parts of a set of shards that are read side by side; processes of a number that divides it share them out
WINDOW = 8192  # items of a lane that are shuffled among each other

# First words of the random streams, so that none repeats another; the third is that of samples.
_EPOCH, _BLOCK, SAMPLE, _LANE = range(4)


class MixedSampler:
    """The order in which the items of several sets are seen, as a function of the position alone.

    A single set is seen in epochs: each is a permutation of its own, drawn from (seed, epoch), and nothing is dropped.
    Where the items lie in shards, the permutation keeps neighbours together, see [`ShardOrder`]. Several sets share
    blocks of 1,000 positions by weight (largest remainder), shuffled from (seed, block); within its share each set
    runs through its own epochs.

    Args:
        lengths (`Sequence[int]`): number of items of each set.
        weights (`Sequence[float]`, *optional*): share of each set, in any unit; default is the lengths.
        seed (`int`): not negative.
        shuffle (`bool`): `False` keeps the items in their order.
        shard_starts (`Sequence[np.ndarray | None]`, *optional*): of each set, the first item of each of its shards.

    Raises:
        ValueError: for empty sets, and weights that do not fit, are not positive, or below 1 in 1,000.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        shuffle: bool = True,
        shard_starts: Sequence[np.ndarray | None] | None = None,
    ):
        """Share out one block; nothing is drawn yet."""
        self.lengths = list(lengths)
        self.shard_starts = shard_starts or [None] * len(self.lengths)
        self.seed = seed
        self.shuffle = shuffle
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"sets of {self.lengths} images: each needs at least one")
        self.counts = _block_counts(self.lengths if weights is None else list(weights), len(self.lengths))
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._epochs: dict[int, tuple[int, np.ndarray | ShardOrder]] = {}

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
            entropy, starts = [self.seed, _EPOCH, index, epoch], self.shard_starts[index]
            if starts is None:
                order = np.random.default_rng(entropy).permutation(self.lengths[index])
            else:
                order = ShardOrder(starts, self.lengths[index], entropy)
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


class ShardOrder:
    """A permutation of items in shards that goes through one after the other, so that few of them are open at a time.

    The shards are laid end to end in random order and cut into 16 lanes of equal length. Positions take turns among
    the lanes; along each of them, the items of every window of 8,192 are shuffled.

    Args:
        starts (`np.ndarray` of shape `(shards,)`, int64): first item of each shard, ascending from 0.
        length (`int`): number of items.
        entropy (`list[int]`): seed of the permutation.
    """

    def __init__(self, starts: np.ndarray, length: int, entropy: list[int]):
        """Draw the order of the shards; windows are drawn when they are reached."""
        self.length = length
        self.entropy = entropy
        order = np.random.default_rng(entropy).permutation(len(starts))
        sizes = np.diff(starts, append=length)[order]
        self.ends = np.cumsum(sizes)  # of the shards, laid end to end
        self.shifts = starts[order] - (self.ends - sizes)
        self.windows: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> int:
        """Return the item at a position of the epoch."""
        index, lane = divmod(position, LANES)
        share, rest = divmod(self.length, LANES)
        window, index = divmod(index, WINDOW)
        if self.windows.get(lane, (None,))[0] != window:
            size = min(WINDOW, share + (lane < rest) - window * WINDOW)
            rng = np.random.default_rng([*self.entropy, _LANE, lane, window])
            self.windows[lane] = (window, rng.permutation(size))
        place = lane * share + min(lane, rest) + window * WINDOW + int(self.windows[lane][1][index])
        return place + int(self.shifts[np.searchsorted(self.ends, place, side="right")])
