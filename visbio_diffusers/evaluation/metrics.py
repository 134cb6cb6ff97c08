"""Distances, diversity and accuracy of image sets, each with a 95 % confidence interval."""

from __future__ import annotations

import math

import numpy as np
import torch


Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution


def proportion_interval(successes: int, n: int) -> dict:
    """Return a share with its Wilson score interval as `dict(value, low, high, n)`.

    Raises:
        ValueError: if `n` is 0.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if n == 0:
        raise ValueError("a share of 0 images is undefined: give at least one image")
    share = successes / n
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
    return {"value": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": int(n)}


def cluster_interval(hits: np.ndarray, clusters: list[str], *, draws: int = 1000, seed: int = 0) -> dict:
    """Return the 95 % interval `dict(low, high)` of a share whose entries come in clusters, by drawing whole clusters.

    Args:
        hits (`np.ndarray` of shape `(n,)`): bool.
        clusters (`list[str]`): which cluster each entry belongs to, such as its prompt.
    """
    _, index = np.unique(clusters, return_inverse=True)
    sizes, sums = np.bincount(index), np.bincount(index, weights=hits)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (draws, len(sizes)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def fidelity(predictions: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """Return the share of images recognised as their label: overall, per class, and the confusion matrix.

    Args:
        predictions, labels (`np.ndarray` of shape `(n,)`): class indices.
        class_names (`tuple` of `str`): one name per class index.

    Returns:
        `dict(overall, per_class, confusion)`; intervals are Wilson's, `confusion[i][j]` counts label i predicted as j.
    """
    num_classes = len(class_names)
    confusion = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    return {
        "overall": proportion_interval(int(np.trace(confusion)), len(labels)),
        "per_class": {
            name: proportion_interval(int(confusion[i, i]), int(confusion[i].sum()))
            for i, name in enumerate(class_names)
            if confusion[i].sum()
        },
        "confusion": confusion.tolist(),
    }


def class_weights(labels: np.ndarray, target_labels: np.ndarray) -> np.ndarray:
    """Weigh the images of one set so that its class shares equal those of another.

    Args:
        labels (`np.ndarray` of shape `(n,)`): class indices of the set to weigh.
        target_labels (`np.ndarray` of shape `(m,)`): class indices whose shares are wanted.

    Returns:
        float64 weights of shape `(n,)` with sum 1; images of classes that the target lacks get 0.

    Raises:
        ValueError: if the target holds a class that `labels` lacks.
    """
    num_classes = int(max(labels.max(), target_labels.max())) + 1
    counts = np.bincount(labels, minlength=num_classes)
    target_shares = np.bincount(target_labels, minlength=num_classes) / len(target_labels)
    missing = np.flatnonzero((target_shares > 0) & (counts == 0))
    if len(missing):
        raise ValueError(f"class {missing[0]} has no real images to compare with: leave it out of the evaluated set")
    return (target_shares / np.maximum(counts, 1))[labels]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    """Return the smallest of `values` below or at which at least the share `quantile` of the weight lies."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(np.searchsorted(cumulative, quantile), len(values) - 1)])


def moments(features: np.ndarray, weights: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean `(d,)` and the unbiased covariance `(d, d)` of features `(n, d)`, both float64.

    `weights` of shape `(n,)` are relative importances (not counts); `None` weighs all alike, which is `np.cov`.

    Raises:
        ValueError: if there are fewer than 2 rows.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} image has no covariance: give at least 2")
    x = torch.as_tensor(features, dtype=torch.float64)
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else torch.as_tensor(weights)
    w = (w / w.sum()).to(torch.float64)
    mean = w @ x
    centred = x - mean
    covariance = (centred * w[:, None]).T @ centred / (1 - w.square().sum())
    return mean, covariance


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """Return the squared Frechet distance of two Gaussians, in squared units of the features.

    Args:
        mean_a, mean_b (`torch.Tensor` of shape `(d,)`): means.
        covariance_a, covariance_b (`torch.Tensor` of shape `(d, d)`): symmetric, positive semi-definite.

    Source: Dowson and Landau 1982; |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2). Equals torchmetrics'
    `FrechetInceptionDistance` on the same features (tests/test_evaluation.py).
    """
    return _frechet_to_root(mean_a, covariance_a, mean_b, _square_root(covariance_b))


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _frechet_to_root(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, root_b: torch.Tensor
) -> float:
    """Return the distance where the square root of the second covariance is known, as for resamples of the first."""
    cross = torch.linalg.eigvalsh(root_b @ covariance_a @ root_b).clamp(min=0).sqrt().sum()
    trace = covariance_a.trace() + root_b.square().sum() - 2 * cross
    return float((mean_a - mean_b).square().sum() + trace.clamp(min=0))


def frechet_with_floor(
    features: np.ndarray,
    floors: list[tuple[np.ndarray, np.ndarray]],
    reference_features: np.ndarray,
    reference_weights: np.ndarray,
    *,
    num_resamples: int = 100,
    seed: int = 0,
) -> dict:
    """Return the Frechet distance of a set to a reference beside that of as many real images, and their ratio.

    Args:
        features (`np.ndarray` of shape `(n, d)`): of the evaluated images.
        floors (`list` of pairs `(n, d)` and `(n,)`): features and weights of draws of as many real images.
        reference_features (`np.ndarray` of shape `(m, d)`) with reference_weights (`(m,)`): what all are compared to.

    Returns:
        `dict(value, floor, ratio)`. `floor` is the mean over the draws with their 2.5 % and 97.5 % quantiles.
        Resampling adds bias to this distance, so the bootstrap distribution of `value` is scaled to the estimate.
    """
    rng = np.random.default_rng(seed)
    mean, covariance = moments(reference_features, reference_weights)
    reference = mean, _square_root(covariance)
    value = _frechet_to_root(*moments(features), *reference)
    rows = rng.integers(len(features), size=(num_resamples, len(features)))
    resampled = np.array([_frechet_to_root(*moments(features[drawn]), *reference) for drawn in rows])
    resampled *= value / resampled.mean()
    drawn_floors = np.array([_frechet_to_root(*moments(*floor), *reference) for floor in floors])
    mean_floors = rng.choice(drawn_floors, size=(num_resamples, len(floors))).mean(axis=1)
    ratio = value / drawn_floors.mean()
    return {
        "value": _with_quantiles(value, resampled, len(features)),
        "floor": _with_quantiles(drawn_floors.mean(), drawn_floors, len(floors[0][0])),
        "ratio": _with_quantiles(ratio, resampled / mean_floors, len(features)),
    }


def _with_quantiles(value: float, draws: np.ndarray, n: int) -> dict:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def within_class_distance(
    features: np.ndarray,
    labels: np.ndarray,
    real_features: np.ndarray,
    real_labels: np.ndarray,
    class_names: tuple[str, ...],
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> dict:
    """Return how far apart images of one class are, over the same for as many real images: 1 is as diverse as real.

    Args:
        features, real_features (`np.ndarray` of shape `(n, d)` and `(m, d)`): of generated and real images.
        labels, real_labels (`np.ndarray` of shape `(n,)` and `(m,)`): class indices.

    Returns:
        `dict(ratio, per_class)`: the mean over classes of the ratio of mean pairwise distances, with bootstrap
        intervals over both sets. Classes with fewer than 2 images on either side are left out; if that leaves none,
        the ratio is None.
    """
    rng = np.random.default_rng(seed)
    per_class, all_ratios = {}, []
    for index, name in enumerate(class_names):
        pair = [features[labels == index], real_features[real_labels == index]]
        if min(map(len, pair)) < 2:
            continue
        generated, real = (_distance_draws(rows, num_resamples, rng) for rows in pair)
        ratios = generated / real
        distances = {"generated": float(generated[0]), "real": float(real[0])}
        per_class[name] = {**_with_quantiles(ratios[0], ratios[1:], len(pair[0])), **distances}
        all_ratios.append(ratios)
    if not all_ratios:
        return {"ratio": None, "per_class": {}}
    mean = np.mean(all_ratios, axis=0)
    return {"ratio": _with_quantiles(mean[0], mean[1:], len(features)), "per_class": per_class}


def _distance_draws(features: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the mean distance of all pairs of rows, then that of resamples; a row's pairs with itself never count."""
    x = torch.as_tensor(features, dtype=torch.float32)
    drawn = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=num_resamples)
    counts = torch.as_tensor(np.vstack([np.ones(len(x)), drawn]), dtype=torch.float32)  # (1 + num_resamples, n)
    counts[(counts > 0).sum(dim=1) == 1] = 1  # a draw of one row alone, in a tiny class, has no pairs
    pairs = counts.sum(dim=1).square() - counts.square().sum(dim=1)
    return ((counts @ torch.cdist(x, x) * counts).sum(dim=1) / pairs).numpy()
