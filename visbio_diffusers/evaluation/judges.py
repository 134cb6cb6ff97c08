"""How the networks of the evaluation are trained on real images: with labels, or by telling images apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from visbio_diffusers.evaluation.features import ImageClassifier, ImageEncoder, to_pixel_values


TEMPERATURE = 0.2
PROJECTION = 64


def augment(pixel_values: torch.Tensor, generator: torch.Generator, flip: bool = True) -> torch.Tensor:
    """Vary images as photographs of the same object vary: position, size, sharpness, light, and noise.

    A quarter of them, taken through rotation, resizing, blur or sharpening, teaches not to rely on sharpness, which
    generated and real images differ in. The others keep their pixels but for shifts, turns and light.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1]; the result exceeds it.
        generator (`torch.Generator`): on the CPU; the only source of randomness.
        flip (`bool`): allow mirror images and quarter turns; not where left and right are classes.
    """
    n, channels, _, width = pixel_values.shape
    device = pixel_values.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    resampled = (uniform(0, 1, n) < 0.25).float()
    angle = resampled * uniform(-0.4, 0.4, n)
    scale = 1 + resampled * uniform(-0.12, 0.12, n)
    mirror = torch.ones(n)
    if flip:
        angle = angle + torch.randint(0, 4, (n,), generator=generator) * (math.pi / 2)
        mirror = torch.where(uniform(0, 1, n) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * scale * mirror, -angle.sin() * scale
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * scale * mirror, angle.cos() * scale
    affine[:, :, 2] = torch.randint(-2, 3, (n, 2), generator=generator) * 2 / width  # up to 2 pixels
    grid = F.affine_grid(affine.to(device), list(pixel_values.shape), align_corners=False)
    images = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)

    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3).to(device)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)
    amount = resampled[:, None, None, None] * uniform(-0.3, 1.0, n, 1, 1, 1)  # below 0 sharpens
    images = images + amount.to(device) * (blurred - images)

    gain = uniform(0.98, 1.02, n, channels, 1, 1) * uniform(0.96, 1.04, n, 1, 1, 1)
    offset = uniform(-0.04, 0.04, n, 1, 1, 1)
    noise = uniform(0, 0.02, n, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    return images * gain.to(device) + (offset + noise).to(device)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    steps: int,
    seed: int,
    width: int = 64,
    kernel_size: int = 3,
    batch_size: int = 64,
    flip: bool = True,
    device: torch.device | str = "cpu",
    description: str = "classifier",
) -> ImageClassifier:
    """Train an `ImageClassifier` from nothing; equal arguments on one machine give equal weights.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        labels (`np.ndarray` of shape `(n,)`): class indices.
        steps (`int`): optimizer steps of `batch_size` images (AdamW, one cycle of the learning rate up to 3e-3).
        flip (`bool`): see `augment`.
        description (`str`): shown beside the progress bar.

    Returns:
        the classifier in evaluation mode, on `device`.

    Raises:
        ValueError: if a label is outside `[0, num_classes)`, or labels are not one per image.
    """
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be {len(images)} integers in 0 to {num_classes - 1}, one class an image")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(num_classes, images.shape[3], width, kernel_size)
    targets = torch.as_tensor(labels, dtype=torch.int64)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixel_values = augment(to_pixel_values(images[rows.numpy()], device), generator, flip)
        return F.cross_entropy(model(pixel_values), targets[rows].to(device))

    minimise(model.to(device), loss_of, len(images), steps, batch_size, generator, description)
    return model


def train_encoder(
    images: np.ndarray,
    *,
    steps: int,
    seed: int,
    width: int = 64,
    kernel_size: int = 3,
    batch_size: int = 256,
    flip: bool = True,
    device: torch.device | str = "cpu",
    description: str = "encoder",
) -> ImageEncoder:
    """Train an `ImageEncoder` without labels: two views of an image must find each other among those of others.

    What a classifier has no use for, such as the background of a cell, still counts here. Arguments and returned value
    as those of `train_classifier`.

    Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageEncoder(images.shape[3], width, kernel_size)
        projector = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, PROJECTION))
    both = nn.Sequential(model, projector).to(device)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixel_values = to_pixel_values(images[rows.numpy()], device)
        views = torch.cat([augment(_zoom_and_tint(pixel_values, generator), generator, flip) for _ in range(2)])
        return contrastive_loss(both(views))

    minimise(both, loss_of, len(images), steps, batch_size, generator, description)
    return model


def contrastive_loss(projections: torch.Tensor) -> torch.Tensor:
    """Return the NT-Xent loss of `projections` (2 n, d), whose rows i and n + i show the same image."""
    rows = F.normalize(projections, dim=1)
    logits = (rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    n = len(rows) // 2
    return F.cross_entropy(logits, torch.arange(2 * n, device=rows.device).roll(n))


def _zoom_and_tint(pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Show a random part of each image, at least 0.8 of its side, in other light, contrast and tint."""
    n, channels = pixel_values.shape[:2]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    zoom = uniform(0.8, 1.0, n)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = uniform(-1, 1, n, 2) * (1 - zoom)[:, None]
    grid = F.affine_grid(affine.to(pixel_values.device), list(pixel_values.shape), align_corners=False)
    images = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    gain = uniform(0.8, 1.2, n, 1, 1, 1) * uniform(0.9, 1.1, n, channels, 1, 1)
    return images * gain.to(images.device) + uniform(-0.1, 0.1, n, 1, 1, 1).to(images.device)


def minimise(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    num_images: int,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    description: str,
) -> None:
    """Minimise `loss_of(rows of a batch)` by AdamW in one cycle of the learning rate, and leave evaluation mode on."""
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    epochs = -(-steps * batch_size // num_images)
    order = torch.cat([torch.randperm(num_images, generator=generator) for _ in range(epochs)])
    for rows in tqdm(order.split(batch_size)[:steps], desc=description):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    model.eval()
