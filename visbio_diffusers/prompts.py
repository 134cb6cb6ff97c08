"""Prompts to draw from in reward fine-tuning, and others held out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from visbio_diffusers.captions import CaptionBank, available_banks, load_bank
from visbio_diffusers.data import load_image_dataset


class Prompts(NamedTuple):
    """Texts for training, and texts of the same things that are worded otherwise, or none."""

    train: list[str]
    heldout: list[str]


def load_prompts(name: str, size: int = 64, heldout_size: int = 8, seed: int = 0) -> Prompts:
    """Return the prompts of a file, a caption bank, or a captioned image set.

    Args:
        name (`str`): a text file with one prompt a line; a caption bank by name or as .yaml, of which each class, or
            each of its subtypes, is asked for as often as the others; or an image set with captions.
        size, heldout_size (`int`): prompts of each class or subtype of a bank.
        seed (`int`): of their choice.

    Raises:
        ValueError: if there are none, or a file is no text in UTF-8.
        FileNotFoundError: if there is no such file.
    """
    path = Path(name)
    if path.suffix == ".txt":
        return Prompts(_read_lines(path), [])
    if path.suffix in (".yaml", ".yml") or name in available_banks():
        return _of_bank(load_bank(name), size, heldout_size, seed)
    captions = load_image_dataset(name, "train").captions
    if captions is None:
        raise ValueError(f"{name} has no captions: give a text file (.txt), a caption bank, or a set with captions")
    return Prompts(list(dict.fromkeys(captions)), [])


def _read_lines(path: Path) -> list[str]:
    """Return the distinct lines of a text file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: save it as one prompt a line") from error
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return prompts


def _of_bank(bank: CaptionBank, size: int, heldout_size: int, seed: int) -> Prompts:
    train, heldout = [], []
    for label, words in enumerate(bank.classes):
        for subtype in words.subtypes or [words.name]:
            share = {"subtype": subtype, "subtype_share": 1.0}
            drawn = bank.pool(label, size + heldout_size, seed, **share)
            train.append(drawn[: max(1, len(drawn) - heldout_size)])
            heldout.append(drawn[len(train[-1]) :])
    return Prompts(_in_turn(train), _in_turn(heldout))


def _in_turn(groups: list[list[str]]) -> list[str]:
    """Return the first of every group, then the second, and so on."""
    longest = max(len(group) for group in groups)
    return list(dict.fromkeys(group[k] for k in range(longest) for group in groups if k < len(group)))


def prompts_of_round(prompts: list[str], count: int, number: int, seed: int) -> list[str]:
    """Return the prompts of a round: each pass through all of them has an order of its own.

    Args:
        prompts (`list[str]`): all of them; where a round takes more, some come several times.
        count (`int`): of a round.
        number (`int`): of the round, from 0.
        seed (`int`): of the order.
    """
    found: list[str] = []
    while len(found) < count:
        place = number * count + len(found)
        order = np.random.default_rng([seed, place // len(prompts)]).permutation(len(prompts))
        first = place % len(prompts)
        found += [prompts[row] for row in order[first : first + count - len(found)]]
    return found
