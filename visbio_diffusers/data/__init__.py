"""Image sets with captions: MedMNIST by flag or file, folders, parquet, Hub sets, and the stream that mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data.cellpose import is_cellpose, load_cellpose
from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError, fit_image
from visbio_diffusers.data.folder import CAPTION_COLUMN, IMAGE_COLUMN, LABEL_COLUMN, load_folder
from visbio_diffusers.data.medmnist import MEDMNIST, cache_folder, list_datasets, load_medmnist, parse_flag
from visbio_diffusers.data.mixture import training_batches
from visbio_diffusers.data.pools import caption_pools
from visbio_diffusers.data.preview import preview
from visbio_diffusers.data.remote import is_remote
from visbio_diffusers.data.sampler import MixedSampler
from visbio_diffusers.data.shards import is_shards, load_shards
from visbio_diffusers.data.streamed import load_streamed


__all__ = [
    "ImageDataset",
    "MissingSplitError",
    "MixedSampler",
    "caption_pools",
    "fit_image",
    "list_datasets",
    "load_cellpose",
    "load_folder",
    "load_image_dataset",
    "load_medmnist",
    "preview",
    "training_batches",
]


def load_image_dataset(
    name: str,
    split: str = "train",
    *,
    resolution: int | None = None,
    channels: int = 3,
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
    label_column: str = LABEL_COLUMN,
    caption_bank: str | None = None,
    max_samples: int | None = None,
    tile_size: int = 64,
    slice_axis: int | None = None,
    slices: int = 1,
    bare: bool = False,
    tile_overlap: float = 0.0,
    min_object_area: float = 0.01,
    object_name: str = "nucleus",
    channel_names: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    streaming: bool = False,
    allow_pipe: bool = False,
) -> ImageDataset:
    """Load one split of any image set: a MedMNIST flag, an npz, a folder, parquet, a Hub set, Cellpose, shards.

    Args:
        name (`str`): a MedMNIST flag ("bloodmnist", "pathmnist_64"), the path of an npz in MedMNIST's format, of a
            parquet file, or of a folder, or "owner/name" of a Hub set. A folder named like a flag is "./bloodmnist".
            WebDataset shards are a folder or an address, see `load_shards`.
        split (`str`): "train", "val" (the same as "validation"), "test", or a split of the set's own.
        resolution (`int`, *optional*): side of the images in pixels (shorter side resized, centre cropped); `None`
            keeps the sizes as they are.
        channels (`int`): 3 for RGB, 1 for grey.
        image_column, caption_column, label_column (`str`): columns of folders, parquet and Hub sets.
        caption_bank (`str`, *optional*): name or YAML file of the bank that describes the classes; default is the
            bank of the MedMNIST set, and none for other sets. Classes are matched by name where the set has names.
        max_samples (`int`, *optional*): keep this many images, drawn at random but always the same.
        tile_size, tile_overlap, min_object_area, object_name, channel_names: of photographs in Cellpose's layout, see
            `load_cellpose`.
        slice_axis (`int`, *optional*), slices (`int`): what is cut from the volumes of MedMNIST's 3-D sets, by default
            the middle across each of the three axes, see `load_medmnist`.
        bare (`bool`): whether folders with neither captions nor classes are taken too, to be looked at.
        cache_dir (`str` or `Path`, *optional*): where downloads are kept.
        streaming (`bool`): leave the images of parquet files and Hub sets where they are until they are needed; those
            of a URL are left anyway.
        allow_pipe (`bool`): let the address of shards be `pipe:COMMAND`, which runs a shell.

    Raises:
        ValueError: for an unknown name, a missing split or column, damaged files, missing captions, or classes that
            the bank does not know.
        FileNotFoundError: if the path does not exist, or a folder has no images.
        OSError: if a download fails.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images have 1 (grey) or 3 (RGB)")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples}: keep at least 1, or leave it out to keep all")
    cache = cache_folder(cache_dir)
    columns = image_column, caption_column, label_column, caption_bank is None
    if is_shards(name):
        dataset = load_shards(name, split, *columns[1:], cache, allow_pipe, bare)
    elif is_remote(name):
        dataset = load_streamed(name, split, *columns, cache, bare)
    elif _is_medmnist(name):
        dataset = load_medmnist(name, split, cache_dir, slice_axis=slice_axis, slices=slices)
    elif is_cellpose(Path(name).expanduser()):
        dataset = load_cellpose(
            name, split, tile_size, resolution,
            tile_overlap=tile_overlap, min_object_area=min_object_area, object_name=object_name,
            channel_names=channel_names,
        )  # fmt: skip
    elif streaming:
        dataset = load_streamed(name, split, *columns, cache, bare)
    else:
        dataset = load_folder(name, split, *columns, cache_dir, bare)
    if caption_bank is not None:
        dataset = _with_bank(dataset, caption_bank)
    if max_samples is not None and max_samples < len(dataset):
        dataset = dataset.select(np.sort(np.random.default_rng(0).permutation(len(dataset))[:max_samples]))
    return dataset.formatted(resolution, channels)


def _is_medmnist(name: str) -> bool:
    """Decide between `load_medmnist` and `load_folder`, and refuse what neither can know."""
    path = Path(name).expanduser()
    if name.endswith(".npz") or name.partition("_")[0] in MEDMNIST:
        return True
    if path.exists():
        return False
    if path.is_absolute() or path.suffix == ".parquet" or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no file or folder {name}: check the path")
    if "/" not in name:
        parse_flag(name)
    return False


def _with_bank(dataset: ImageDataset, caption_bank: str) -> ImageDataset:
    """Let `caption_bank` describe the labels, renumbered to its order where the set names its classes."""
    if dataset.labels is None:
        raise ValueError(f"{dataset.name} has no labels for the bank {caption_bank}: choose with --label_column")
    bank_names = tuple(load_bank(caption_bank).class_names)
    labels = dataset.labels
    if dataset.class_names is not None and labels.ndim == 1:
        position = {_plain(name): index for index, name in enumerate(bank_names)}
        unknown = [name for name in dataset.class_names if _plain(name) not in position]
        if unknown:
            raise ValueError(
                f"the caption bank {caption_bank} has no class {unknown[0]!r} of {dataset.name}:"
                f" it has {', '.join(bank_names)}"
            )
        labels = np.array([position[_plain(name)] for name in dataset.class_names])[labels]
    num_labels = labels.shape[1] if labels.ndim == 2 else labels.max() + 1
    if num_labels > len(bank_names) or labels.min() < 0:
        raise ValueError(f"{dataset.name} has {num_labels} classes, the bank {caption_bank} has {len(bank_names)}")
    return replace(dataset, labels=labels, class_names=bank_names, bank=caption_bank)


def _plain(class_name: str) -> str:
    """Reduce "Immature_granulocytes" to "immature granulocyte"."""
    return class_name.lower().replace("_", " ").replace("-", " ").strip().removesuffix("s")
