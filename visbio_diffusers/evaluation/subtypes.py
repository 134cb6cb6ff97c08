"""Subtypes of the classes of a caption bank: their real images, and the captions that ask for one."""

from __future__ import annotations

import re

import numpy as np

from visbio_diffusers.captions import CaptionBank
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation.images import Split, as_split
from visbio_diffusers.evaluation.metrics import Z_95, cluster_interval


class Subtypes:
    """The subtypes of a bank in the order of its classes; a class without subtypes is one itself.

    Args:
        bank (`CaptionBank`): with one class an image.
    """

    def __init__(self, bank: CaptionBank):
        self.bank = bank
        self.parts = [(label, name) for label, words in enumerate(bank.classes) for name in words.subtypes or [None]]
        self.names = tuple(name or bank.class_names[label] for label, name in self.parts)
        self.classes = np.array([label for label, _ in self.parts])

    def real(self, dataset: ImageDataset) -> Split:
        """Return the images of a set, labelled by the place of their subtype in `names`, if that is known.

        Raises:
            ValueError: if no image has a subtype of the bank.
        """
        subtypes = dataset.subtypes or [None] * len(dataset)
        said = [subtype or dataset.class_names[label] for subtype, label in zip(subtypes, dataset.labels)]
        rows = [row for row, name in enumerate(said) if name in self.names]
        if not rows:
            raise ValueError(
                f"no image of {dataset.name} ({dataset.split}) has a subtype of the bank {self.bank.name}"
            )
        split = as_split(dataset.select(np.array(rows)))
        return Split(split.images, np.array([self.names.index(said[row]) for row in rows]))

    def plain_caption(self, row: int) -> str:
        """Return the plainest prompt of a subtype."""
        return self.bank.plain_caption(*self.parts[row])

    def heldout_captions(self, row: int) -> list[str]:
        """Return the held-out captions of the class; where it has subtypes, those that name this one."""
        label, subtype = self.parts[row]
        captions = self.bank.heldout_captions(label)
        if subtype is None:
            return captions
        names = [re.escape(name) for name in (subtype, *self.bank.classes[label].subtypes[subtype].synonyms)]
        return [caption for caption in captions if re.search(rf"\b({'|'.join(names)})\b", caption)]


def at_equal_shares(recognised: dict) -> dict:
    """Return the mean over subtypes of the share recognised, as if there were as many images of each.

    Args:
        recognised (`dict`): from [`fidelity`].

    Returns:
        `dict(value, low, high)`: the interval is the normal one of a stratified sample.
    """
    parts = recognised["per_class"].values()
    value = sum(each["value"] for each in parts) / len(parts)
    variance = sum(each["value"] * (1 - each["value"]) / each["n"] for each in parts) / len(parts) ** 2
    return {
        "value": value,
        "low": max(0.0, value - Z_95 * variance**0.5),
        "high": min(1.0, value + Z_95 * variance**0.5),
    }


def by_prompt(right: np.ndarray, prompts: list[str]) -> dict:
    """Return the share that is right, with an interval that takes images of one prompt as one observation."""
    return {"value": float(right.mean()), **cluster_interval(right, prompts), "n": len(set(prompts))}


def render_subtypes(results: dict) -> str:
    """Return the results of train_scripts/evaluate_subtypes.py as a Markdown table."""
    judges = results["evaluators"]
    kinds = {"generated": "generated", "real_test": "real", "heldout_wording": "held-out wording"}
    columns = [(name, kind) for name in judges for kind in kinds if kind in judges[name]]
    rows = [["Recognised", *(f"{name}: {kinds[kind]}" for name, kind in columns)], ["---"] * (1 + len(columns))]
    for subtype in results["subtypes"]:
        rows.append([subtype, *(_share(judges[name][kind]["per_class"].get(subtype)) for name, kind in columns)])
    whole = {"generated": "overall", "real_test": "at_equal_shares", "heldout_wording": "by_prompt"}
    rows.append(["all, at equal shares", *(_share(judges[name][kind][whole[kind]]) for name, kind in columns)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + f"\n\n`{results['command']}`\n"


def _share(entry: dict | None) -> str:
    return "-" if entry is None else f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
