"""Are generated images of use? Classifiers trained on few real images, with and without generated ones.

The generator, too, has seen those few images alone: one trained on the whole set would smuggle the others in.
"""

from __future__ import annotations

import numpy as np

from visbio_diffusers.evaluation import features as evaluator_features
from visbio_diffusers.evaluation.features import predictions
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.evaluation.judges import train_classifier
from visbio_diffusers.evaluation.metrics import proportion_interval


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


def accuracy_of_training(
    training: Split, test: Split, num_classes: int, *, steps: int, seeds: list[int], flip: bool = True, device: str
) -> dict:
    """Train one classifier per seed on `training` and return their accuracy on `test`.

    Returns:
        `dict(value, low, high, n, per_seed)`: the mean over seeds; the interval is that of the test images at this
        mean, widened by the standard error over seeds.
    """
    accuracies = []
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
        answers = predictions(model, evaluator_features.features(model, test.images))
        accuracies.append(float((answers == test.labels).mean()))
    n, mean = len(test.labels), float(np.mean(accuracies))
    entry = proportion_interval(round(mean * n), n)
    error = float(np.std(accuracies, ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else 0.0
    return {
        "value": mean,
        "low": max(0.0, mean - np.hypot(mean - entry["low"], 1.96 * error)),
        "high": min(1.0, mean + np.hypot(entry["high"] - mean, 1.96 * error)),
        "n": n,
        "per_seed": accuracies,
    }
