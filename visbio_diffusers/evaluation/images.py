"""Labelled images to evaluate, in memory and in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visbio_diffusers.data import ImageDataset, fit_image, load_image_dataset
from visbio_diffusers.data.npz import read_npz_split
from visbio_diffusers.files import whole_file


@dataclass(frozen=True)
class Split:
    """Labelled images, real or generated.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        labels (`np.ndarray` of shape `(n,)`): class indices, int64.
    """

    images: np.ndarray
    labels: np.ndarray


def as_split(dataset: ImageDataset) -> Split:
    """Decode all images of a set with one class per image.

    Raises:
        ValueError: if the set has no labels, several per image, or images of different sizes.
    """
    name = f"the {dataset.split} split of {dataset.name}"
    if dataset.labels is None or dataset.labels.ndim != 1:
        raise ValueError(f"{name} needs one class label per image to be evaluated")
    images = [dataset[i]["image"] for i in range(len(dataset))]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{name} has images of different sizes: resize them to one size first")
    return Split(np.stack(images), dataset.labels.astype(np.int64))


def no_larger(split: Split, real: ImageDataset) -> Split:
    """Return images reduced to the side of the real ones if they are larger: another pipeline may draw 512 pixels."""
    side = min(real[0]["image"].shape[:2])
    if split.images.shape[1] == split.images.shape[2] <= side:
        return split
    channels = split.images.shape[3]
    return Split(np.stack([fit_image(image, side, channels) for image in split.images]), split.labels)


def read_images(source: str | Path, class_names: tuple[str, ...], caption_bank: str | None = None) -> Split:
    """Read generated images from an npz (`train_images`, `train_labels`) or from an image folder with labels.

    Args:
        source (`str` or `Path`): labels of an npz are indices of `class_names`; those of a folder are names.
        caption_bank (`str`, *optional*): bank of the real set, by whose class names a folder's labels are ordered.

    Raises:
        ValueError: for missing keys, wrong types, or classes that the real set does not have.
    """
    if not str(source).endswith(".npz"):
        dataset = load_image_dataset(str(source), "train", caption_bank=caption_bank)
        if dataset.class_names != class_names:
            raise ValueError(f"{source} has the classes {dataset.class_names}, the real images have {class_names}")
        return as_split(dataset)
    images, labels = read_npz_split(source, "train", Path(source).parent)
    images = images[..., None] if images.ndim == 3 else images
    if labels.ndim != 1:
        raise ValueError(f"{source} needs one class label per image to be evaluated")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"{source} has labels outside 0 to {len(class_names) - 1}, the classes of the real images")
    return Split(images, labels)


def save_images(path: str | Path, generated: Split, prompts: list[str]) -> None:
    """Write images, labels and prompts to an npz that `read_images` reads, whole or not at all."""
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, train_images=generated.images, train_labels=generated.labels, prompts=prompts)
