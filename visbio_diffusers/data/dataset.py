"""The one form in which every image set reaches the training and the evaluation: `ImageDataset`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps


logger = logging.getLogger(__name__)

KEEP_BYTES = 2**28  # decoded images of a set are kept if all of them fit


class UnreadableImage(ValueError):
    """An image of a set of shards that cannot be read; a training goes on without it."""


class MissingSplitError(ValueError):
    """A set has no split of the name asked for, or nothing in it."""


def fit_image(image: np.ndarray | Image.Image, resolution: int | None = None, channels: int = 3) -> np.ndarray:
    """Return an image as uint8 RGB or grey array of the wanted size.

    Args:
        image (`np.ndarray` of shape `(height, width)` or `(height, width, 1 or 3)`, or `PIL.Image.Image`): 8 bits.
        resolution (`int`, *optional*): side in pixels; the shorter side is resized (antialiased bicubic) to it, then
            the centre is cropped. `None` keeps the size.
        channels (`int`): 3 for RGB, 1 for grey.

    Returns:
        uint8 array of shape `(height, width, channels)`.
    """
    if isinstance(image, np.ndarray):
        image = image[:, :, None] if image.ndim == 2 else image
        if (resolution is None or image.shape[:2] == (resolution, resolution)) and image.shape[2] in (1, channels):
            return image if image.shape[2] == channels else np.repeat(image, channels, axis=2)
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    mode = "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)  # which would copy it
    if resolution is not None and image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)


def fit_mask(mask: np.ndarray, resolution: int) -> np.ndarray:
    """Return instance masks, uint16 `(height, width)`, fitted as [`fit_image`] fits their image, by nearest pixels."""
    if mask.shape == (resolution, resolution):
        return mask
    return np.asarray(ImageOps.fit(Image.fromarray(mask), (resolution, resolution), Image.Resampling.NEAREST))


@dataclass
class ImageDataset:
    """Images of one split of one set, with whatever is known about each of them.

    Args:
        name (`str`): the set, as the user named it.
        split (`str`): "train", "val", "test" or a split of the user's own.
        images (`np.ndarray` of shape `(n, height, width[, channels])`, uint8, or a sequence of PIL images): arrays are
            kept in memory, a sequence decodes on access.
        labels (`np.ndarray` of shape `(n,)`, int64, or `(n, classes)`, 0/1, *optional*): class of every image.
        captions (`Sequence[str]`, *optional*): caption of every image.
        subtypes (`Sequence[str | None]`, *optional*): a finer name than the class, where one is known.
        class_names (`tuple[str, ...]`, *optional*): in the order of the labels.
        bank (`str`, *optional*): caption bank that turns labels into captions.
        licence (`str`, *optional*): licence of the images.
        resolution (`int`, *optional*), channels (`int`): form of the images in the items, see `fit_image`.
        shard_starts (`np.ndarray` of shape `(shards,)`, int64, *optional*): first image of each of the files in which
            they lie; a training then goes through one file after the other.
        masks (`np.ndarray` of shape `(n, height, width)`, uint16, or a sequence of such, *optional*): 0 is background,
            1 to k the objects.
        kept (`tuple[np.ndarray, np.ndarray]`, *optional*): room for images once decoded, and which ones are.
    """

    name: str
    split: str
    images: np.ndarray | Sequence[Image.Image]
    labels: np.ndarray | None = None
    captions: Sequence[str] | None = None
    subtypes: Sequence[str | None] | None = None
    class_names: tuple[str, ...] | None = None
    bank: str | None = None
    licence: str | None = None
    resolution: int | None = None
    channels: int = 3
    shard_starts: np.ndarray | None = None
    masks: np.ndarray | Sequence[np.ndarray] | None = None
    kept: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` (uint8, height x width x channels), `label` (int, 0/1 vector, None), `subtype`, `caption`.

        Where masks are known, also `mask` (uint16, height x width).
        """
        return {"image": self._image(index), **self.about(index)}

    def about(self, index: int) -> dict[str, Any]:
        """Return what is known of an image, without the image."""
        label = None if self.labels is None else self.labels[index]
        known = {}
        if self.masks is not None:
            mask = self.masks[index]
            known["mask"] = mask if self.resolution is None else fit_mask(mask, self.resolution)
        return {
            "label": int(label) if np.ndim(label) == 0 and label is not None else label,
            "subtype": None if self.subtypes is None else self.subtypes[index],
            "caption": None if self.captions is None else self.captions[index],
            **known,
        }

    def select(self, indices: np.ndarray) -> ImageDataset:
        """Return the items at `indices` (int array) as a set of its own."""
        in_memory = isinstance(self.images, np.ndarray)
        return replace(
            self,
            images=np.asarray(self.images[indices]) if in_memory else self.images.select(indices),
            labels=None if self.labels is None else self.labels[indices],
            captions=None if self.captions is None else [self.captions[i] for i in indices],
            subtypes=None if self.subtypes is None else [self.subtypes[i] for i in indices],
            shard_starts=None,
            masks=self.masks[indices]
            if isinstance(self.masks, np.ndarray)
            else self.masks and self.masks.select(indices),
            kept=None,
        )

    def formatted(self, resolution: int | None, channels: int) -> ImageDataset:
        """Return the set with items of the given form; arrays in memory are resized now, others on first access."""
        images = self.images
        in_memory = isinstance(images, np.ndarray) and not isinstance(images, np.memmap)
        kept = None
        if in_memory and resolution is not None and images.shape[1:3] != (resolution, resolution):
            if resolution >= 2 * images.shape[1]:
                logger.warning("%s: %d pixel images enlarged to %d", self.name, images.shape[1], resolution)
            stored = channels if images.ndim == 4 and images.shape[3] == 3 else 1  # grey is spread to RGB on access
            resized = np.empty((len(images), resolution, resolution, stored), dtype=np.uint8)
            for index, image in enumerate(images):
                resized[index] = fit_image(image, resolution, stored)
            images = resized
        elif not in_memory and resolution is not None and len(self) * resolution**2 * channels <= KEEP_BYTES:
            kept = np.zeros((len(self), resolution, resolution, channels), np.uint8), np.zeros(len(self), bool)
        masks = self.masks
        if isinstance(masks, np.ndarray) and resolution is not None:
            masks = np.stack([fit_mask(mask, resolution) for mask in masks])
        return replace(self, images=images, resolution=resolution, channels=channels, masks=masks, kept=kept)

    def _image(self, index: int) -> np.ndarray:
        if self.kept is None:
            return fit_image(self.images[index], self.resolution, self.channels)
        pixels, known = self.kept
        if not known[index]:
            pixels[index] = fit_image(self.images[index], self.resolution, self.channels)
            known[index] = True
        return pixels[index]
