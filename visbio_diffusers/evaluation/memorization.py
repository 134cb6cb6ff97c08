"""How near generated images come to training images, beside how near unseen real images come."""

from __future__ import annotations

import numpy as np
import torch

from visbio_diffusers.evaluation.metrics import proportion_interval, weighted_quantile


COPY_QUANTILES = (0.01, 0.05)


def nearest_distances(
    queries: np.ndarray, bank: np.ndarray, *, chunk_size: int = 512, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest row of a bank for each query.

    Args:
        queries, bank (`np.ndarray` of shapes `(n, ...)` and `(m, ...)`): uint8 images (taken to [0, 1]) or features.
        chunk_size (`int`): queries compared at once; memory grows with `chunk_size * m`.

    Returns:
        Euclidean distances `(n,)` float32, exactly 0 for a copy, and the rows of the bank `(n,)` int64.

    Raises:
        ValueError: if a query has another shape than the rows of the bank.
    """
    if queries.shape[1:] != bank.shape[1:]:
        raise ValueError(f"images of shape {queries.shape[1:]} cannot be compared with training {bank.shape[1:]}")
    flat_bank = _flatten(bank, device)
    squared_norms = flat_bank.square().sum(dim=1)
    distances, rows = [], []
    for start in range(0, len(queries), chunk_size):
        chunk = _flatten(queries[start : start + chunk_size], device)
        nearest = torch.addmm(squared_norms, chunk, flat_bank.T, alpha=-2).argmin(dim=1)  # |q|^2 shifts all rows alike
        distances.append((chunk - flat_bank[nearest]).norm(dim=1).cpu())  # the expanded square above would not be 0
        rows.append(nearest.cpu())
    return torch.cat(distances).numpy(), torch.cat(rows).numpy()


def _flatten(array: np.ndarray, device: str) -> torch.Tensor:
    flat = torch.as_tensor(array.reshape(len(array), -1), device=device).float()
    return flat / 255 if array.dtype == np.uint8 else flat


def near_copies(distances: np.ndarray, unseen_distances: np.ndarray, unseen_weights: np.ndarray) -> dict:
    """Return the share of images that lie nearer to the training set than the nearest of the unseen real images do.

    Args:
        distances (`np.ndarray` of shape `(n,)`): of the evaluated images to their nearest training image.
        unseen_distances (`np.ndarray` of shape `(m,)`): the same of real images that were not trained on.
        unseen_weights (`np.ndarray` of shape `(m,)`): their weights, which bring them to the same class shares.

    Returns:
        For each quantile q of COPY_QUANTILES (as text): the share nearer than the q-quantile of the unseen
        distances, its Wilson interval and the `threshold`. The unseen images themselves have at most q.
    """
    result = {}
    for quantile in COPY_QUANTILES:
        threshold = weighted_quantile(unseen_distances, unseen_weights, quantile)
        share = proportion_interval(int((distances < threshold).sum()), len(distances))
        result[str(quantile)] = {**share, "threshold": threshold}
    return result
