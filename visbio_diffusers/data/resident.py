"""Images that stay on the device that trains: a step waits for no file, no processor and no transfer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.mixture import flip_images


class ResidentImages:
    """All images of several sets as uint8 on one device, picked and flipped there.

    Args:
        datasets (`Sequence[ImageDataset]`): images of one size; all are decoded now.
        device (`torch.device`): where they are kept.
        random_flip (`str`): "none", "horizontal" or "dihedral", see `flip_images`.

    Raises:
        ValueError: for an image that cannot be read, or of another size than the first.
    """

    def __init__(self, datasets: Sequence[ImageDataset], device: torch.device, random_flip: str = "none"):
        """Decode and upload the images."""
        first = datasets[0][0]["image"]
        self.starts = np.cumsum([0, *map(len, datasets)])
        pixels = np.empty((self.starts[-1], *first.shape), np.uint8)
        items = (dataset[index]["image"] for dataset in datasets for index in range(len(dataset)))
        for index, image in enumerate(tqdm(items, desc="decoding images", total=len(pixels), disable=None)):
            if image.shape != first.shape:
                raise ValueError(f"images of {first.shape} and {image.shape} do not fit together: give a resolution")
            pixels[index] = image
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(2).to(device).contiguous()  # (n, C, H W)
        self.size = first.shape[:2]
        numbers = np.arange(first.shape[0] * first.shape[1]).reshape(*first.shape[:2], 1)
        turned = flip_images([numbers] * 8, np.arange(8), random_flip)  # where each pixel of an orientation comes from
        self.places = torch.from_numpy(turned.reshape(8, 1, -1)).to(device)

    def __call__(self, sources: Sequence[tuple[int, int]], orientations: np.ndarray) -> torch.Tensor:
        """Return float32 `(batch, channels, height, width)` in [-1, 1], equal to those of `training_batches`.

        Args:
            sources (`Sequence[tuple[int, int]]`): index of the set and index in it.
            orientations (`np.ndarray` of shape `(batch,)`): see `flip_images`.
        """
        sets, indices = np.array(sources).T
        where = torch.from_numpy(np.stack([self.starts[sets] + indices, orientations]))
        rows, orientations = to_device(where, self.pixels.device)
        picked = self.pixels[rows]
        turned = picked.gather(2, self.places[orientations].expand_as(picked)).unflatten(2, self.size)
        return turned.float().div_(127.5).sub_(1.0)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small tensor on a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
