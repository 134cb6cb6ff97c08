"""What an adapter that was tuned to a reward gains and costs, by a judge that is no reward; its table for the card."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from visbio_diffusers.evaluation.metrics import proportion_interval


Judged = dict[str, np.ndarray]


def gain(tuned: list[np.ndarray], base: np.ndarray, size: int) -> dict[str, Any]:
    """Return the mean difference to the base over images and trainings, with its standard error over prompts.

    Args:
        tuned (`list` of `np.ndarray` of shape `(n,)`): of each training.
        base (`np.ndarray` of shape `(n,)`): of the same prompts and seeds.
        size (`int`): images of each prompt, which follow each other.
    """
    differences = np.mean(tuned, axis=0) - base
    prompts = differences.reshape(-1, size).mean(axis=1)
    return {
        "value": float(differences.mean()),
        "standard_error": float(prompts.std(ddof=1) / len(prompts) ** 0.5) if len(prompts) > 1 else None,
        "by_training": [float(each.mean() - base.mean()) for each in tuned],
        "n": len(differences),
    }


def diversity(features: np.ndarray, size: int) -> float:
    """Return the mean distance of the features `(n, d)` of images of one prompt, of which `size` follow each other."""
    if size == 1:
        return float("nan")
    groups = torch.as_tensor(features).unflatten(0, (-1, size))
    return (torch.cdist(groups, groups).sum(dim=(1, 2)) / (size * (size - 1))).mean().item()


def compare(found: list[Judged], base: Judged, size: int, class_size: int) -> dict[str, Any]:
    """Return what adapters gain and cost beside the base.

    Args:
        found (`list[dict]`), base (`dict`): of each training, and without: `right`, `log_prob` and `features` of
            images of prompts, `class_right` of those of classes.
        size, class_size (`int`): images of each prompt, and of each class.
    """
    spread = [diversity(each["features"], size) / diversity(base["features"], size) for each in found]
    return {
        "recognised": float(np.mean([each["right"].mean() for each in found])),
        "gain": gain([each["right"] for each in found], base["right"], size),
        "log_prob_gain": gain([each["log_prob"] for each in found], base["log_prob"], size),
        "class_recognised": float(np.mean([each["class_right"].mean() for each in found])),
        "class_gain": gain([each["class_right"] for each in found], base["class_right"], class_size),
        "diversity_over_base": {"value": float(np.mean(spread)), "by_training": spread},
    }


def render_tuning(results: dict) -> str:
    """Return the results of train_scripts/evaluate_reward_tuning.py as Markdown tables."""
    real, base = results["judge"]["real"], results["base"]
    head = ["", "Recognised as asked for", "Gain", "Main classes", "Diversity within a prompt"]
    head += ["Training", "Images scored"]
    rows = [["without adapter", f"{base['right']:.3f}", "-", f"{base['class_right']:.3f}", "1", "-", "-"]]
    for name, entry in results["adapters"].items():
        cells = [f"{name} ({entry['trainings']} trainings)" if entry["trainings"] > 1 else name]
        cells += [f"{entry['recognised']:.3f}", _difference(entry["gain"])]
        cells += [f"{entry['class_recognised']:.3f} ({_difference(entry['class_gain'])})"]
        cells += [f"{entry['diversity_over_base']['value']:.2f}", f"{entry['minutes']:.0f} min", f"{entry['queries']}"]
        rows.append(cells)
    tuned = results["adapters"]["tuned"]
    lines = [" | ".join(cells) for cells in [head, ["---"] * len(head), *rows]]
    table = "\n".join(f"| {line} |" for line in lines)
    kinds = ["without adapter", *results["adapters"]]
    parts = [" | ".join(cells) for cells in [["Subtype", *kinds], ["---"] * (1 + len(kinds))]]
    for name, entry in results["by_subtype"].items():
        parts.append(" | ".join([name, *(f"{entry[kind]:.2f}" for kind in ["base", *results["adapters"]])]))
    subtypes = "\n".join(f"| {line} |" for line in parts)
    splits = " and ".join(results["judge"]["splits"])
    return (
        f"{table}\n\nGain: difference to the same prompts and seeds without adapter, +- its standard error over "
        f"prompts. n = {tuned['gain']['n']} images of held-out prompts and {tuned['class_gain']['n']} of plain "
        f"captions of classes. The judge, a classifier of another shape that learned from the {splits} splits, "
        f"which no reward has seen, is right on {real['value']:.3f} of {real['n']} real images of the train split.\n\n"
        f"{subtypes}\n\n`{results['command']}`\n"
    )


def _difference(entry: dict) -> str:
    error = "" if entry["standard_error"] is None else f" +- {entry['standard_error']:.3f}"
    return f"{entry['value']:+.3f}{error}"


def share_right(answers: np.ndarray, labels: np.ndarray) -> dict:
    """Return the share of answers that are right, with its interval."""
    return proportion_interval(int((answers == labels).sum()), len(labels))
