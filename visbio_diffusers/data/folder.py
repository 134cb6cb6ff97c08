"""Image folders, parquet files and Hub sets, read through the `datasets` library and decoded on access."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError
from visbio_diffusers.data.photograph import to_eight_bits
from visbio_diffusers.files import one_line, read_utf8


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

IMAGE_COLUMN, CAPTION_COLUMN, LABEL_COLUMN = "image", "text", "label"
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class EncodedImages:
    """An image column of a `datasets.Dataset` as a sequence of PIL images: decodes on access, names what it cannot.

    Args:
        column (`datasets.Dataset`): with the one column `image_column`, whose images are not decoded.
        image_column (`str`): its name.
        source (`str`): the set, for messages.
    """

    column: datasets.Dataset
    image_column: str
    source: str

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.column)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one decoded image of 8 bits; 16-bit ones are scaled linearly from [0, 65535].

        Raises:
            ValueError: if it cannot be read, or has 32 bits and so an unknown range; names the file or row.
        """
        image = self.open(index)
        try:
            return to_eight_bits(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read image {self.where(index)} ({error}): replace or remove it") from error

    def open(self, index: int) -> Image.Image:
        """Return one image of which only the header is read; raises as access does."""
        encoded = self.column[int(index)][self.image_column]
        if encoded is None:
            raise ValueError(f"no image in {self.where(index)}: remove the row")
        try:
            return Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"cannot read image {self.where(index)} ({reason}): replace or remove it") from error

    def encoded(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        encoded = self.column[int(index)][self.image_column]
        return Path(encoded["path"]).read_bytes() if encoded["bytes"] is None else encoded["bytes"]

    def where(self, index: int) -> str:
        """Return the file of an image, or its row where it comes from no file of its own."""
        encoded = self.column[int(index)][self.image_column]
        return encoded["path"] if encoded and encoded["path"] else f"{self.source}, row {int(index)}"

    def select(self, indices: np.ndarray) -> EncodedImages:
        """Return the images at `indices` (int array)."""
        return replace(self, column=self.column.select(indices))


def load_folder(
    name: str,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
    label_column: str = LABEL_COLUMN,
    captions_needed: bool = True,
    cache_dir: str | Path | None = None,
    bare: bool = False,
) -> ImageDataset:
    """Load one split of an image folder, a parquet file or folder, or a Hub set.

    An image folder has captions in `metadata.jsonl` or `metadata.csv` (columns `file_name` and `caption_column`) in
    the folder of the split, or one subfolder per class. A column `subtype` beside a label refines the class.

    Args:
        name (`str`): path of the folder or parquet file, or "owner/name" of a Hub set.
        split (`str`): name of the split; "val" and "validation" are the same.
        image_column, caption_column, label_column (`str`): names of the columns.
        captions_needed (`bool`): `False` if a caption bank speaks for the labels: captions are then not read.
        cache_dir (`str` or `Path`, *optional*): cache of the `datasets` library.
        bare (`bool`): whether a set without the column of captions, and without classes, is taken too.

    Raises:
        FileNotFoundError: if the folder or file does not exist, or the folder has no images.
        ValueError: for missing splits and columns, empty or missing captions, metadata in another encoding than UTF-8,
            and unreadable images.
        OSError: if the Hub cannot be reached.
    """
    table = _load_table(str(name), split, cache_dir)
    _check_column(table, name, image_column, "image_column")
    source = Path(name).name if Path(name).exists() else str(name)
    images = _encoded_images(table, image_column, str(name))
    labels, class_names = _read_labels(table, label_column, str(name))
    # Classes may stand in for captions, but not for a caption column that was asked for by name.
    optional = (bare or class_names is not None) and caption_column == CAPTION_COLUMN
    captions = None
    if captions_needed and (caption_column in table.column_names or not optional):
        captions = _read_captions(table, caption_column, images, str(name))
    return ImageDataset(
        name=source,
        split=split,
        images=images,
        labels=labels,
        captions=captions,
        subtypes=_read_subtypes(table, labels, class_names),
        class_names=class_names,
    )


def _load_table(name: str, split: str, cache_dir: str | Path | None) -> datasets.Dataset:
    import datasets  # a second of import, for those who use it

    path = Path(name).expanduser()
    if path.is_dir():
        arguments = _folder_arguments(path)
    elif path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is neither .npz nor .parquet: give such a file or a folder of images")
        arguments = {"path": "parquet", "data_files": str(path)}
    else:
        arguments = {"path": name}
    try:
        tables = datasets.load_dataset(**arguments, cache_dir=None if cache_dir is None else str(cache_dir))
    except ConnectionError as error:
        raise OSError(f"no file or folder {name} here, and no Hub set within reach: {one_line(error)}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"cannot read {name}: {one_line(error.__cause__ or error)}") from error
    aliases = {"val": "validation", "validation": "val"}
    found = split if split in tables else aliases.get(split)
    if found not in tables:
        raise MissingSplitError(f"{name} has no split {split!r}: it has {', '.join(tables)}")
    if path.is_dir() and arguments["path"] == "imagefolder":
        _warn_of_unlisted(path, sum(len(table) for table in tables.values()))
    return tables[found]


def _folder_arguments(path: Path) -> dict[str, str]:
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.name not in METADATA_FILES}
    if ".parquet" in suffixes:
        return {"path": "parquet", "data_dir": str(path)}
    if not suffixes & set(Image.registered_extensions()):
        raise FileNotFoundError(f"no images and no parquet files in {path}: put them there or give another folder")
    for name in ("metadata.jsonl", "metadata.csv"):
        for file in path.rglob(name):
            read_utf8(file)  # refused here, in better words
    return {"path": "imagefolder", "data_dir": str(path)}


def _warn_of_unlisted(path: Path, listed: int) -> None:
    present = sum(file.suffix.lower() in Image.registered_extensions() for file in path.rglob("*"))
    if present > listed:
        logger.warning(
            "%d of %d images in %s have no line in its metadata and are left out", present - listed, present, path
        )


def _check_column(table: datasets.Dataset, name: str, column: str, flag: str) -> None:
    if column not in table.column_names:
        hint = "" if len(table.column_names) > 1 else "; captions stand in metadata.jsonl in the folder of the split"
        raise ValueError(
            f"{name} has no column {column!r}, only {', '.join(table.column_names)}: choose with --{flag}{hint}"
        )


def _encoded_images(table: datasets.Dataset, image_column: str, name: str) -> EncodedImages:
    import datasets

    if not isinstance(table.features[image_column], datasets.Image):
        raise ValueError(f"column {image_column!r} of {name} holds no images: choose with --image_column")
    column = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    images = EncodedImages(column, image_column, name)
    if len(images) == 0:
        raise ValueError(f"{name} has no rows in this split: choose another")
    if column[0][image_column] and column[0][image_column]["bytes"] is None:
        for index in range(len(images)):  # files of the user's own: better refused now than in the third hour
            images.open(index).close()
    return images


def _read_labels(
    table: datasets.Dataset, label_column: str, name: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    import datasets

    if label_column == LABEL_COLUMN and label_column not in table.column_names:
        return None, None
    _check_column(table, name, label_column, "label_column")
    values = table[label_column][:]
    if None in values:
        raise ValueError(f"column {label_column!r} of {name} misses {values.count(None)} labels: remove these rows")
    feature = table.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return np.asarray(values, dtype=np.int64), tuple(feature.names)
    if isinstance(values[0], str):
        class_names = tuple(sorted(set(values)))
        return np.asarray([class_names.index(value) for value in values], dtype=np.int64), class_names
    labels = np.asarray(values)
    if labels.dtype.kind not in "iub":
        raise ValueError(f"column {label_column!r} of {name} is neither class names nor integers: choose another")
    return labels.astype(np.int64 if labels.ndim == 1 else np.uint8), None


def _read_captions(table: datasets.Dataset, caption_column: str, images: EncodedImages, name: str) -> list[str]:
    _check_column(table, name, caption_column, "caption_column")
    captions = table[caption_column][:]
    wrong = [index for index, caption in enumerate(captions) if not isinstance(caption, str) or not caption.strip()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(captions)} captions in column {caption_column!r} of {name} are empty or no text,"
            f" the first is that of {images.where(wrong[0])}: write them or remove these rows"
        )
    return captions


def _read_subtypes(
    table: datasets.Dataset, labels: np.ndarray | None, class_names: tuple[str, ...] | None
) -> list[str | None] | None:
    if "subtype" not in table.column_names or class_names is None:
        return None
    subtypes = table["subtype"][:]
    return [s if s and s != class_names[label] else None for s, label in zip(subtypes, labels, strict=True)]
