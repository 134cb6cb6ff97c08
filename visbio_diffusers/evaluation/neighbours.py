"""Two-sample measures of feature sets: kernel distance, and precision, recall, density and coverage by neighbours.

Their intervals come from half-samples: a statistic of a random half of the rows, drawn without replacement, spreads as
the statistic of all rows does under new draws from the population (Shao and Wu 1989, the delete-d jackknife with
d = n / 2). The bootstrap would repeat rows, and a repeated row is its own nearest neighbour at distance 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from visbio_diffusers.evaluation.metrics import Z_95


NEAREST_K = 5  # Naeem et al. 2020
NUM_HALVES = 50
MANIFOLD_MEASURES = ("precision", "recall", "density", "coverage")
RANGES = {"kernel": (-math.inf, math.inf), "density": (0, math.inf)}  # the others are shares


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy of features `(n, d)` and `(m, d)`, unbiased, so it may be below 0.

    The kernel is (x y / d + 1)^3. On Inception features this is the KID of Binkowski et al. 2018.

    Raises:
        ValueError: if either has fewer than 2 rows.
    """
    return _kernel_statistic(*_kernels(features, reference))


def _kernels(features: np.ndarray, reference: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the kernel within the features, within the reference, and across."""
    if min(len(features), len(reference)) < 2:
        raise ValueError("a kernel distance needs at least 2 images on either side")
    x, y = (torch.as_tensor(rows, dtype=torch.float64) for rows in (features, reference))
    return tuple((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))


def _kernel_statistic(within: torch.Tensor, within_reference: torch.Tensor, across: torch.Tensor) -> float:
    n, m = across.shape
    own = (within.sum() - within.trace()) / (n * (n - 1))
    reference = (within_reference.sum() - within_reference.trace()) / (m * (m - 1))
    return float(own + reference - 2 * across.mean())


def kernel_distance_with_interval(features: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> dict:
    """Return [`kernel_distance`] as `dict(value, low, high, n)`."""
    kernels = _kernels(features, reference)

    def of_half(rows: torch.Tensor, columns: torch.Tensor) -> dict:
        within, within_reference, across = kernels
        half = within[rows][:, rows], within_reference[columns][:, columns], across[rows][:, columns]
        return {"kernel": _kernel_statistic(*half)}

    return _with_intervals({"kernel": _kernel_statistic(*kernels)}, of_half, *kernels[2].shape, seed)["kernel"]


def manifold_measures(features: np.ndarray, reference: np.ndarray, nearest_k: int = NEAREST_K) -> dict[str, float]:
    """Return precision, recall, density and coverage of features `(n, d)` against real ones `(m, d)`.

    Each set's manifold is the union of balls around its rows that reach to the `nearest_k`-th neighbour in the set.

    * precision: share of the features inside the real manifold; recall: share of the real rows inside the other
      (Kynkaanniemi et al. 2019).
    * density: how many real balls hold a feature, over `nearest_k`; above 1 where features crowd. Coverage: share of
      the real rows whose ball holds a feature (Naeem et al. 2020).

    Raises:
        ValueError: if either has no more than `nearest_k` rows.
    """
    return _manifold_statistic(*_distances(features, reference, nearest_k), nearest_k)


def _distances(features: np.ndarray, reference: np.ndarray, nearest_k: int) -> tuple[torch.Tensor, ...]:
    """Return distances within the features, within the reference, and from reference rows to features."""
    if min(len(features), len(reference)) <= nearest_k:
        raise ValueError(f"precision and recall need more than {nearest_k} images on either side")
    x, y = (torch.as_tensor(rows, dtype=torch.float64) for rows in (features, reference))
    return torch.cdist(x, x), torch.cdist(y, y), torch.cdist(y, x)


def _manifold_statistic(
    within: torch.Tensor, within_reference: torch.Tensor, across: torch.Tensor, nearest_k: int
) -> dict[str, float]:
    radii, real_radii = (d.kthvalue(nearest_k + 1, dim=1).values for d in (within, within_reference))  # 0 is itself
    in_real_ball = across < real_radii[:, None]  # (m, n)
    return {
        "precision": in_real_ball.any(dim=0).double().mean().item(),
        "recall": (across < radii).any(dim=1).double().mean().item(),
        "density": in_real_ball.sum(dim=0).double().mean().item() / nearest_k,
        "coverage": in_real_ball.any(dim=1).double().mean().item(),
    }


def manifold_measures_with_intervals(
    features: np.ndarray, reference: np.ndarray, nearest_k: int = NEAREST_K, *, seed: int = 0
) -> dict[str, dict]:
    """Return [`manifold_measures`], each as `dict(value, low, high, n)`."""
    if min(len(features), len(reference)) // 2 <= nearest_k:
        raise ValueError(f"precision and recall with intervals need {2 * nearest_k + 2} images or more on either side")
    distances = _distances(features, reference, nearest_k)

    def of_half(rows: torch.Tensor, columns: torch.Tensor) -> dict:
        within, within_reference, across = distances
        half = within[rows][:, rows], within_reference[columns][:, columns], across[columns][:, rows]
        return _manifold_statistic(*half, nearest_k)

    return _with_intervals(_manifold_statistic(*distances, nearest_k), of_half, len(features), len(reference), seed)


def _with_intervals(
    values: dict[str, float], of_half: Callable[[torch.Tensor, torch.Tensor], dict], n: int, m: int, seed: int
) -> dict[str, dict]:
    """Give each value a 95 % interval: 1.96 times the spread of half-samples on either side, within its range."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(NUM_HALVES):
        rows, columns = (torch.as_tensor(rng.permutation(count)[: count // 2]) for count in (n, m))
        draws.append(of_half(rows, columns))
    result = {}
    for name, value in values.items():
        reach = Z_95 * float(np.std([draw[name] for draw in draws], ddof=1))
        least, most = RANGES.get(name, (0, 1))
        result[name] = {"value": value, "low": max(least, value - reach), "high": min(most, value + reach), "n": n}
    return result
