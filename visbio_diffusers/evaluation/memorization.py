"""How near generated images come to training images, beside unseen real images, and what a model betrays.

Three looks: nearest neighbours in pixels or features, the best match of shapes whatever turn, shift or colour, and
whether the model denoises the images it was trained on better than others (membership inference).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from visbio_diffusers.evaluation.features import to_pixel_values
from visbio_diffusers.evaluation.metrics import Z_95, proportion_interval, weighted_quantile
from visbio_diffusers.losses import denoising_errors
from visbio_diffusers.text import text_mask


if TYPE_CHECKING:
    from visbio_diffusers.pipelines.pipeline_visbio import VisBioPipeline


COPY_QUANTILES = (0.01, 0.05)
MAX_SHIFT = 2  # pixels
ATTACK_TIMESTEPS = (50, 100, 200, 300, 400)  # where some detail is left to remember


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


def best_matches(
    queries: np.ndarray, bank: np.ndarray, *, max_shift: int = MAX_SHIFT, chunk_size: int = 1024, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Find for each query the image of a bank that it resembles most, whatever its turn, mirroring, shift or colour.

    The resemblance is the correlation of brightness over the pixels that both show: 1 for a copy that was turned by
    quarters, mirrored, moved by up to `max_shift` pixels, made lighter, darker, or of more or less contrast.

    Args:
        queries, bank (`np.ndarray` of shape `(n, height, width, channels)` and `(m, ...)`): uint8, one square size.
        chunk_size (`int`): queries compared at once; memory grows with `chunk_size * m`.

    Returns:
        correlations `(n,)` float32 in [-1, 1], and the rows of the bank `(n,)` int64.

    Raises:
        ValueError: if sizes differ, or images are not square or not wider than `2 * max_shift + 1`.
    """
    if queries.shape[1:3] != bank.shape[1:3] or bank.shape[1] != bank.shape[2] or bank.shape[1] <= 2 * max_shift + 1:
        raise ValueError(f"images of {queries.shape[1:3]} cannot be matched with {bank.shape[1:3]}: one square size")
    side = bank.shape[1] - 2 * max_shift
    inner = slice(max_shift, max_shift + side)
    columns = _standardised(_brightness(bank, device)[:, inner, inner]).T.contiguous()
    correlations, rows = [], []
    for start in tqdm(range(0, len(queries), chunk_size), desc="matching shapes"):
        chunk = _brightness(queries[start : start + chunk_size], device)
        best = torch.full((len(chunk),), -torch.inf, device=device)
        row = torch.zeros(len(chunk), dtype=torch.int64, device=device)
        for view in _views(chunk, side):
            value, where = (_standardised(view) @ columns).max(dim=1)
            row = torch.where(value > best, where, row)
            best = torch.maximum(best, value)
        correlations.append(best.cpu())
        rows.append(row.cpu())
    return torch.cat(correlations).numpy().clip(-1, 1), torch.cat(rows).numpy()


def _brightness(images: np.ndarray, device: str) -> torch.Tensor:
    """Return the mean of the channels (n, height, width)."""
    return torch.as_tensor(images, device=device).float().mean(dim=3)


def _views(images: torch.Tensor, side: int) -> Iterator[torch.Tensor]:
    """Yield the eight turns and mirrorings of images (n, height, width), each at every place of a window."""
    places = range(images.shape[1] - side + 1)
    for mirrored in (images, images.flip(2)):
        for quarters in range(4):
            turned = mirrored.rot90(quarters, (1, 2))
            for top in places:
                for left in places:
                    yield turned[:, top : top + side, left : left + side]


def _standardised(images: torch.Tensor) -> torch.Tensor:
    """Return rows (n, pixels) with mean 0 and length 1, so that a product of two is their correlation."""
    rows = images.flatten(1)
    return F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)


@torch.no_grad()
def denoising_losses(
    pipe: VisBioPipeline, images: np.ndarray, prompts: list[str], *, seed: int = 0, batch_size: int = 64
) -> np.ndarray:
    """Return how badly a model denoises each image: the loss of its training, averaged over `ATTACK_TIMESTEPS`.

    Args:
        pipe (`VisBioPipeline`): on the device to use.
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8, of the size the model was trained at.
        prompts (`list[str]`): one caption an image.
        seed (`int`): image i gets the noise of the seed `seed + i`.

    Returns:
        float32 of shape `(n,)`.
    """
    device, scheduler = pipe.device, DDPMScheduler.from_config(pipe.scheduler.config)
    losses = []
    for start in tqdm(range(0, len(images), batch_size), desc="denoising"):
        states, _ = pipe.encode_prompt(prompts[start : start + batch_size], do_classifier_free_guidance=False)
        clean = to_pixel_values(images[start : start + batch_size], device)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(clean))]
        errors = []
        for timestep in ATTACK_TIMESTEPS:
            noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in generators]).to(device)
            timesteps = torch.full((len(clean),), timestep, device=device)
            errors.append(
                denoising_errors(pipe.unet, scheduler, clean, noise, timesteps, states, text_mask(states)).cpu()
            )
        losses.append(torch.stack(errors).mean(dim=0))
    return torch.cat(losses).numpy()


def membership_auc(member_losses: np.ndarray, other_losses: np.ndarray) -> dict:
    """Return how well the loss tells trained-on images from others: area under the ROC curve, 0.5 is not at all.

    Args:
        member_losses (`np.ndarray` of shape `(n,)`), other_losses (`(m,)`): lower is taken as "was trained on".

    Returns:
        `dict(value, low, high, n)`, the interval by DeLong et al. 1988.

    Raises:
        ValueError: if either has fewer than 2 entries.
    """
    n, m = len(member_losses), len(other_losses)
    if min(n, m) < 2:
        raise ValueError("membership inference needs at least 2 images on either side")
    members, others = member_losses[:, None].astype(np.float64), other_losses[None].astype(np.float64)
    wins = (members < others) + 0.5 * (members == others)  # (n, m)
    value = wins.mean()
    half = Z_95 * np.sqrt(wins.mean(axis=1).var(ddof=1) / n + wins.mean(axis=0).var(ddof=1) / m)
    return {"value": float(value), "low": float(max(0, value - half)), "high": float(min(1, value + half)), "n": n + m}
