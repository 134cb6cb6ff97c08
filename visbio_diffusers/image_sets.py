"""Which images a training sees, and in which form: the settings that all trainings on images share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from visbio_diffusers.config import TrainConfig, flag
from visbio_diffusers.data import ImageDataset, load_image_dataset
from visbio_diffusers.data.cellpose import is_cellpose


@dataclass(frozen=True, kw_only=True)
class ImageSetsConfig(TrainConfig):
    """Settings of a training on captioned images."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={"help": "MedMNIST flags, .npz, image folders, .parquet or Hub sets; several are mixed"},
    )
    train_data_dir: str = flag("", "an image folder, as one more (or the only) data set")
    dataset_weights: list[float] = field(default_factory=list, metadata={"help": "share of each set; default by size"})
    image_column: str = flag("image", "column of the images")
    caption_column: str = flag("text", "column of the captions")
    label_column: str = flag("label", "column of the class labels")
    caption_bank: str = flag(
        "", "bank (name or .yaml) that turns labels into captions; of several sets, not for tiles, which have theirs"
    )
    captions_per_class: int = flag(2048, "distinct captions of each class and subtype")
    resolution: int = flag(28, "side of the images in pixels")
    tile_size: int = flag(64, "side of the tiles cut from photographs in Cellpose's layout, in their pixels")
    slice_axis: int = flag(-1, "axis (0, 1, 2) across which the volumes of MedMNIST's 3-D sets are cut; -1 is each")
    slices: int = flag(1, "slices around the middle of a volume, for each axis")
    tile_overlap: float = flag(
        0.0, "share of a tile that it has in common with the next, 0 to 0.9; above 0 covers all"
    )
    min_object_area: float = flag(0.01, "share of a tile below which an object's part in it does not count")
    object_name: str = flag("nucleus", "what the masks show, for captions: cell, or ovum/ova with its plural")
    channel_names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "channels of the photographs, e.g. cytoplasm nucleus; none is not shown; default as in the file"
        },
    )
    streaming: bool = flag(False, "fetch parquet files and Hub sets file by file, for sets larger than the disk")
    allow_pipe: bool = flag(False, "let shards be the output of a shell command: pipe:COMMAND")
    max_train_samples: int = flag(0, "use so many images of each set; 0 uses all")
    random_flip: Literal["none", "horizontal", "dihedral"] = flag(
        "none", "dihedral adds turns by 90 degrees: for images without an upright position"
    )
    save_dtype: Literal["fp32", "fp16"] = flag("fp16", "dtype of the weights written")
    max_shard_size: str = flag("10GB", "largest file of weights, e.g. 15MB: larger ones are split")

    def __post_init__(self) -> None:
        """Check the sets too."""
        super().__post_init__()
        if not self.datasets:
            raise ValueError("nothing to train on: give --dataset_name, e.g. bloodmnist, or --train_data_dir")

    @property
    def datasets(self) -> list[str]:
        """Names of all data sets."""
        return [*self.dataset_name, self.train_data_dir] if self.train_data_dir else self.dataset_name


def load_image_sets(config: ImageSetsConfig, channels: int, split: str = "train") -> list[ImageDataset]:
    """Load one split of every set in one size.

    Raises:
        ValueError: for images that cannot be read, and what [`load_image_dataset`] refuses.
        OSError: if a set cannot be downloaded.
    """
    return [
        load_image_dataset(
            name,
            split,
            resolution=config.resolution,
            channels=channels,
            image_column=config.image_column,
            caption_column=config.caption_column,
            label_column=config.label_column,
            caption_bank=None if _has_own_captions(name, config) else config.caption_bank or None,
            max_samples=config.max_train_samples or None,
            tile_size=config.tile_size,
            slice_axis=None if config.slice_axis == -1 else config.slice_axis,
            slices=config.slices,
            tile_overlap=config.tile_overlap,
            min_object_area=config.min_object_area,
            object_name=config.object_name,
            channel_names=config.channel_names,
            streaming=config.streaming,
            allow_pipe=config.allow_pipe,
        )
        for name in config.datasets
    ]


def _has_own_captions(name: str, config: ImageSetsConfig) -> bool:
    """Return whether a set is one of tiles, captioned by what is measured in them, beside others."""
    return len(config.datasets) > 1 and is_cellpose(Path(name).expanduser())
