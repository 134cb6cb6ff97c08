"""Are generated images of use? Classifiers trained on few real images, with and without generated ones.

The generator, too, has seen those few images alone: one trained on the whole set would smuggle the others in.
"""

from __future__ import annotations

import numpy as np

from visbio_diffusers.evaluation import features as evaluator_features
from visbio_diffusers.evaluation.features import predictions
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.evaluation.judges import train_classifier
from visbio_diffusers.evaluation.metrics import Z_95
from visbio_diffusers.evaluation.report import cell


T_95 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by degrees of freedom


def few_of_each(split: Split, per_class: int, seed: int) -> Split:
    """Return `per_class` images of every class, drawn at random.

    Raises:
        ValueError: if a class has fewer.
    """
    rng, rows = np.random.default_rng(seed), []
    for label, count in zip(*np.unique(split.labels, return_counts=True), strict=True):
        if count < per_class:
            raise ValueError(f"class {label} has {count} images, not {per_class}: choose fewer images of each class")
        rows.append(rng.permutation(np.flatnonzero(split.labels == label))[:per_class])
    rows = np.sort(np.concatenate(rows))
    return Split(split.images[rows], split.labels[rows])


def mixed(real: Split, synthetic: Split) -> Split:
    """Return both sets, the real one repeated until it makes at least half, so that it is not drowned."""
    times = max(1, -(-len(synthetic.labels) // len(real.labels)))
    images = np.concatenate([np.tile(real.images, (times, 1, 1, 1)), synthetic.images])
    return Split(images, np.concatenate([np.tile(real.labels, times), synthetic.labels]))


def answers_after_training(
    training: Split, test: Split, num_classes: int, *, steps: int, seeds: list[int], flip: bool = True, device: str
) -> np.ndarray:
    """Train one classifier per seed on `training` and return which test images it is right on, bool `(seeds, n)`."""
    right = []
    for seed in seeds:
        model = train_classifier(
            training.images,
            training.labels,
            num_classes=num_classes,
            steps=steps,
            seed=seed,
            flip=flip,
            device=device,
            description=f"classifier on {len(training.labels)} images, seed {seed}",
        )
        right.append(predictions(model, evaluator_features.features(model, test.images)) == test.labels)
    return np.stack(right)


def accuracy(right: np.ndarray) -> dict:
    """Return the mean of `right` `(seeds, n)` as `dict(value, low, high, n, per_seed)`."""
    return {**_mean_over_seeds_and_images(right), "per_seed": right.mean(axis=1).tolist()}


def gain(right: np.ndarray, without: np.ndarray) -> dict:
    """Return how much more of the test images are right, as `dict(value, low, high, n)`; both `(seeds, n)`, paired."""
    return _mean_over_seeds_and_images(right.astype(float) - without)


def _mean_over_seeds_and_images(values: np.ndarray) -> dict:
    """Return a mean with the interval of new test images and of new seeds, by Student's t over the seeds."""
    seeds, n = values.shape
    variance = values.mean(axis=0).var(ddof=1) / n
    if seeds > 1:
        variance += values.mean(axis=1).var(ddof=1) / seeds
    quantile = T_95[seeds - 1] if 1 < seeds <= len(T_95) else Z_95
    mean, half = float(values.mean()), float(quantile * np.sqrt(variance))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def render_low_data(results: dict) -> str:
    """Return the Markdown table of what `evaluate_low_data.py` has measured."""
    kinds = {
        "real": "Real alone",
        "real_and_synthetic": "With generated",
        "synthetic": "Generated alone",
        "gain": "Gain",
    }
    lines = [f"| Real images a class | {' | '.join(kinds.values())} |", "|" + " --- |" * (1 + len(kinds))]
    for entry in results["runs"]:
        lines.append(f"| {entry['per_class']} | {' | '.join(cell(entry[kind]) for kind in kinds)} |")
    settings = results["settings"]
    lines += [
        "",
        f"Accuracy on real test images of classifiers from {len(settings['seeds'])} seeds; the generator has seen the"
        f" same few images alone, and drew {settings['synthetic_per_class']} of each class.",
        "",
        f"`{results['command']}`",
    ]
    return "\n".join(lines) + "\n"
