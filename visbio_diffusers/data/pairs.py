"""Captions for contrastive learning, and which of them fit which images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.pools import MULTI_LABEL_SIZE, label_key, plain_caption


UNSAID = -1  # the subtype of a caption that is true of a whole class, and of an image whose subtype is unknown


def matching_pairs(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Return which caption fits which image, bool `(n, m)`: their class is the same, and no other subtype is said.

    Args:
        images (`torch.Tensor` of shape `(n, 2)`), captions (`(m, 2)`): meanings of [`CaptionPairs`].
    """
    image, caption = images[:, None], captions[None]
    unsaid = (image[..., 1] == UNSAID) | (caption[..., 1] == UNSAID)
    return (image[..., 0] == caption[..., 0]) & (unsaid | (image[..., 1] == caption[..., 1]))


class CaptionPairs:
    """Captions of image sets, each with its meaning: the number of a class, and of one of its subtypes or `UNSAID`.

    Sets with a caption bank draw from captions of the class and, half of the time where it is known, of the subtype.
    Others have their own captions, each of which fits those images alone that have the very same one, or else their
    class names.

    Args:
        datasets (`Sequence[ImageDataset]`): the sets.
        size (`int`): captions of each class, and of each subtype.
        seed (`int`): of their choice.

    Raises:
        ValueError: if a set has neither a bank nor captions nor class names.
    """

    def __init__(self, datasets: Sequence[ImageDataset], size: int, seed: int):
        """Draw all captions."""
        self.pools: dict[tuple[int, int], list[str]] = {}
        self._numbers: dict[Any, int] = {}
        self._meanings = [self._learn(dataset, size, seed) for dataset in datasets]
        self._said: dict[str, tuple[int, int]] = {}
        for meaning in sorted(self.pools, key=lambda meaning: meaning[1] != UNSAID):  # a class before its subtypes
            self._said |= {text: meaning for text in self.pools[meaning] if text not in self._said}

    def _learn(self, dataset: ImageDataset, size: int, seed: int) -> list[tuple[int, int]]:
        """Draw the captions of a set that no set before it had, and return the meaning of each image."""
        if dataset.bank is not None:
            bank = load_bank(dataset.bank)
            classes = [(bank.name, label_key(label)) for label in dataset.labels]
        elif dataset.captions is not None:
            classes = [(None, caption) for caption in dataset.captions]
        elif dataset.class_names is not None:
            classes = [(None, plain_caption(dataset.class_names[label])) for label in dataset.labels]
        else:
            raise ValueError(f"{dataset.name} has no captions: choose with --caption_column, or give a --caption_bank")
        meanings = {}
        for each in dict.fromkeys(zip(classes, dataset.subtypes or [None] * len(dataset))):
            (_, key), subtype = each
            whole = self._numbers.setdefault(each[0], len(self._numbers)), UNSAID
            meanings[each] = whole
            if dataset.bank is None:
                self.pools[whole] = [key]
            elif whole not in self.pools:
                one = isinstance(key, int)
                name = bank.class_names[key] if one else None  # the name of the class itself: none of its subtypes
                self.pools[whole] = bank.pool(key, size if one else min(size, MULTI_LABEL_SIZE), seed, subtype=name)
            if subtype is not None and dataset.bank is not None:
                meanings[each] = whole[0], self._numbers.setdefault(each, len(self._numbers))
                if meanings[each] not in self.pools:
                    self.pools[meanings[each]] = bank.pool(key, size, seed, subtype=subtype, subtype_share=1.0)
        return [meanings[each] for each in zip(classes, dataset.subtypes or [None] * len(dataset))]

    def caption(self, dataset_index: int, item: dict[str, Any], rng: np.random.Generator) -> str:
        """Draw the caption of an image: a `caption_fn` for `training_batches`."""
        meaning = self._meanings[dataset_index][item["index"]]
        if meaning[1] != UNSAID and rng.random() < 0.5:
            meaning = meaning[0], UNSAID
        pool = self.pools[meaning]
        return pool[int(rng.integers(len(pool)))]

    def of_images(self, sources: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the meanings `(n, 2)` of images, given as (index of the set, index of the image)."""
        return torch.tensor([self._meanings[dataset][index] for dataset, index in sources])

    def of_captions(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the meanings `(n, 2)` of captions.

        Raises:
            KeyError: for a text that is not among the captions.
        """
        return torch.tensor([self._said[text] for text in texts])
