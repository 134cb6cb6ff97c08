"""Images that a set holds twice: exactly, by a digest of the pixels, or nearly, by a perceptual hash.

Both are eight bytes for an image, so that sets of any size can be looked through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from tqdm import tqdm


SIDE = 32  # pixels to which an image is reduced before its frequencies are looked at
FREQUENCIES = np.arange(1, 9)  # cycles over twice the side; 0 is the mean
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
FLAT = 2.0  # standard deviation, in grey levels, below which an image has no pattern to compare

# Near are images whose hashes differ in up to MAX_DISTANCE bits and whose thumbnails correlate by MIN_CORRELATION.
# Measured at 28 pixels: of the 146 million pairs of different images in rebuilt BloodMNIST, 5 pass the first test and
# 1 both, which is the same cell; of the 17 million in rebuilt PneumoniaMNIST, 284 and 1. Of 1,500 images each, all
# are found again as JPEG of quality 75, brightened by 12 levels or enlarged to 64 pixels, 99.5 % or more with noise of
# 4 levels, 98 % or more as JPEG of quality 50. Shifted by a pixel at that size, or turned, they are not.
MAX_DISTANCE = 6  # bits
MIN_CORRELATION = 0.97

KEPT_THUMBNAILS = 10_000  # of 4 kB


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """Return the 64-bit pHash of each image: which of its 8 x 8 lowest frequencies are above their median.

    Args:
        images (`np.ndarray` of shape `(n, height, width, 1 or 3)`, uint8).

    Returns:
        uint64 array of shape `(n,)`. The number of bits in which two differ, always even, tells how alike they are.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions, section 3.2.1, with
    frequencies 1 to 8 as in its library pHash; images are reduced to 32 x 32 by a triangle filter.
    """
    grey = _grey(images)
    rows, columns = (_lowest_frequencies(side) for side in grey.shape[1:])
    found = (rows @ grey @ columns.T).reshape(len(grey), 64)
    return np.packbits(found > np.median(found, axis=1, keepdims=True), axis=1).view(">u8")[:, 0].astype(np.uint64)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Return a uint8 image `(height, width, 1 or 3)` in grey as float32 `(1024,)`, of mean 0 and length 1.

    The product of two is their correlation.
    """
    grey = _grey(image)
    small = (_reduction(grey.shape[0]) @ grey @ _reduction(grey.shape[1]).T).ravel()
    small -= small.mean()
    return (small / np.linalg.norm(small)).astype(np.float32)


def _grey(images: np.ndarray) -> np.ndarray:
    """Return the grey levels of uint8 images, the last axis of which are 1 or 3 channels, as float32."""
    return images[..., 0].astype(np.float32) if images.shape[-1] == 1 else images.astype(np.float32) @ LUMA


def _reduction(side: int) -> np.ndarray:
    """Return the matrix `(SIDE, side)` that reduces or enlarges a line of pixels by a triangle filter."""
    scale = max(side / SIDE, 1.0)
    centres = (np.arange(SIDE) + 0.5) * side / SIDE
    weights = np.clip(1 - np.abs(np.arange(side) + 0.5 - centres[:, None]) / scale, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _lowest_frequencies(side: int) -> np.ndarray:
    """Return the matrix `(8, side)` that reduces a line of pixels to `SIDE` and gives its DCT-II."""
    cosines = np.cos(np.pi / SIDE * FREQUENCIES[:, None] * (np.arange(SIDE) + 0.5))
    return cosines.astype(np.float32) @ _reduction(side)


def pixel_digest(image: np.ndarray) -> int:
    """Return 64 bits that only images of the same size and pixels share (but for one chance in 2^64)."""
    found = blake2b(np.ascontiguousarray(image), digest_size=8, key=str(image.shape).encode())
    return int.from_bytes(found.digest(), "big")


@dataclass
class Fingerprints:
    """What is kept of images that are looked through.

    Args:
        hashes (`list[np.ndarray]`, uint64): perceptual hashes.
        digests (`list[np.ndarray]`, uint64): of the pixels.
        flat (`list[np.ndarray]`, bool): whether the image shows next to nothing, such as a black slice.
    """

    hashes: list[np.ndarray] = field(default_factory=list)
    digests: list[np.ndarray] = field(default_factory=list)
    flat: list[np.ndarray] = field(default_factory=list)

    def add(self, images: np.ndarray) -> None:
        """Take in the next images, uint8 `(n, height, width, channels)`."""
        self.hashes.append(perceptual_hash(images))
        self.flat.append(_grey(images).std(axis=(1, 2)) < FLAT)
        self.digests.append(np.array([pixel_digest(image) for image in images], np.uint64))

    def exact_groups(self) -> list[np.ndarray]:
        """Return the groups of two or more images with the same pixels, as indices, by their first image."""
        return _groups(np.concatenate(self.digests))

    def near_groups(self, read: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """Return the groups of images linked by likeness, see `MAX_DISTANCE`, as indices, by their first image.

        Of images with the same pixels only the first counts, and flat ones do not.

        Args:
            read (`Callable[[int], np.ndarray]`): returns an image by its index.
        """
        rows = np.unique(np.concatenate(self.digests), return_index=True)[1]
        rows = rows[~np.concatenate(self.flat)[rows]]
        small = lru_cache(maxsize=KEPT_THUMBNAILS)(lambda index: thumbnail(read(index)))
        root = np.arange(sum(map(len, self.hashes)))
        for left, right in close_pairs(np.concatenate(self.hashes)[rows], MAX_DISTANCE):
            for a, b in zip(rows[left].tolist(), rows[right].tolist(), strict=True):
                first, last = sorted((_find(root, a), _find(root, b)))
                if first != last and small(a) @ small(b) >= MIN_CORRELATION:
                    root[last] = first
        return _groups(np.array([_find(root, index) for index in range(len(root))]))


def close_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of all pairs of uint64 hashes that differ in up to `max_distance` bits, in blocks.

    Two of them agree in at least one of `max_distance + 1` bands of bits, so that only hashes with a band in common
    are compared, and memory grows with their number, not with that of the pairs.
    """
    edges = np.linspace(0, 64, max_distance + 2).astype(int).tolist()
    bands = [np.uint64((1 << end) - (1 << start)) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    for number, band in enumerate(tqdm(bands, desc="comparing", unit="band", disable=None)):
        order = np.argsort(hashes & band, kind="stable")
        ordered = hashes[order] & band
        ends = np.searchsorted(ordered, ordered, side="right")
        step, first = 1, np.arange(len(order))
        while len(first := first[ends[first] > first + step]):  # each hash with the one `step` places on in its band
            left, right = order[first], order[first + step]
            near = distance(hashes[left], hashes[right]) <= max_distance
            left, right = left[near], right[near]
            new = np.ones(len(left), bool)
            for earlier in bands[:number]:  # which have found their pairs
                new &= (hashes[left] ^ hashes[right]) & earlier != 0
            yield left[new], right[new]
            step += 1


def distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the number of bits in which uint64 hashes of shape `(n,)` differ."""
    bits = left ^ right  # counted in pairs, then in fours, then in bytes; numpy 1 has no bitwise_count
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


def _find(root: np.ndarray, index: int) -> int:
    """Return the first member of the group of `index`, and shorten the way to it."""
    while root[index] != index:
        root[index] = root[root[index]]
        index = int(root[index])
    return index


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Return the indices of equal keys, where there are several, by the first."""
    order = np.argsort(keys, kind="stable")
    parts = np.split(order, np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: part[0])
