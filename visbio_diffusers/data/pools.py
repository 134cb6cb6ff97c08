"""A finite set of captions for every item, so that each can be encoded once before a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data.dataset import ImageDataset


CaptionFunction = Callable[[int, dict[str, Any], np.random.Generator], str]
MULTI_LABEL_SIZE = 32  # captions of one combination of findings, of which there are hundreds


def caption_pools(datasets: Sequence[ImageDataset], size: int, seed: int) -> tuple[CaptionFunction, list[str]]:
    """Return a `caption_fn` for `training_batches`, and all captions that it can return.

    Args:
        datasets (`Sequence[ImageDataset]`): sets with a bank draw from `size` captions for each class and subtype;
            others have their own captions, or else their class names.
        size (`int`): captions of each class and subtype.
        seed (`int`): of their choice.

    Raises:
        ValueError: if a set has neither a bank nor captions nor class names.
    """
    pools: dict[Any, list[str]] = {}
    captions: dict[str, None] = {}
    for index, dataset in enumerate(datasets):
        if dataset.bank is not None:
            bank = load_bank(dataset.bank)
            count = size if dataset.labels.ndim == 1 else min(size, MULTI_LABEL_SIZE)
            subtypes = dataset.subtypes or [None] * len(dataset)
            for label, subtype in dict.fromkeys(zip(map(label_key, dataset.labels), subtypes)):
                pools[index, label, subtype] = bank.pool(label, count, seed, subtype=subtype)
        elif dataset.captions is not None:
            captions.update(dict.fromkeys(dataset.captions))
        elif dataset.class_names is not None:
            pools.update({(index, k, None): [plain_caption(name)] for k, name in enumerate(dataset.class_names)})
        else:
            raise ValueError(f"{dataset.name} has no captions: choose with --caption_column, or give a --caption_bank")
    for pool in pools.values():
        captions.update(dict.fromkeys(pool))

    return partial(_caption, pools), list(captions)


def _caption(pools: dict[Any, list[str]], dataset_index: int, item: dict[str, Any], rng: np.random.Generator) -> str:
    """Return a caption of the pool of an item, or else its own; a function of the module, as worker processes need."""
    pool = pools.get((dataset_index, label_key(item["label"]), item["subtype"])) if item["label"] is not None else None
    return item["caption"] if pool is None else pool[int(rng.integers(len(pool)))]


def label_key(label: Any) -> int | tuple[int, ...]:
    """Return a label, or a vector of findings, as what a dict can look up."""
    return int(label) if np.ndim(label) == 0 else tuple(int(value) for value in label)


def plain_caption(class_name: str) -> str:
    """Return the one caption of a class of which only the name is known."""
    return f"a microscopy image of {class_name}"
