"""MedMNIST's sets, volumes as slices: the table of them, and their npz files.

They are read without pickle and without the medmnist package.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.download import download_file
from visbio_diffusers.data.npz import is_volumes, read_npz_split


BASE_URL = "https://zenodo.org/records/10519652/files"
SIZES = (28, 64, 128, 224)


class MedMNISTSet(NamedTuple):
    """Facts about one set; `md5` follows `SIZES`, of which 3-D sets have two, `num_samples` is (train, val, test)."""

    channels: int
    num_classes: int
    task: str
    licence: str
    num_samples: tuple[int, int, int]
    md5: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels that there are."""
        return SIZES[: len(self.md5)]


# Source: info.py of the medmnist package, version 3.0.2, and Zenodo record 10519652.
# fmt: off
MEDMNIST = {
    "pathmnist": MedMNISTSet(
        3, 9, "multi-class", "CC BY 4.0", (89996, 10004, 7180),
        ("a8b06965200029087d5bd730944a56c1", "55aa9c1e0525abe5a6b9d8343a507616",
         "ac42d08fb904d92c244187169d1fd1d9", "2c51a510bcdc9cf8ddb2af93af1eadec"),
    ),
    "chestmnist": MedMNISTSet(
        1, 14, "multi-label", "CC BY 4.0", (78468, 11219, 22433),
        ("02c8a6516a18b556561a56cbdd36c4a8", "9de6cd0b934ebb5b7426cfba5efbae16",
         "db107e5590b27930b62dbaf558aebee3", "45bd33e6f06c3e8cdb481c74a89152aa"),
    ),
    "dermamnist": MedMNISTSet(
        3, 7, "multi-class", "CC BY-NC 4.0", (7007, 1003, 2005),
        ("0744692d530f8e62ec473284d019b0c7", "b70a2f5635c6199aeaa28c31d7202e1f",
         "2defd784463fa5243564e855ed717de1", "8974907d8e169bef5f5b96bc506ae45d"),
    ),
    "octmnist": MedMNISTSet(
        1, 4, "multi-class", "CC BY 4.0", (97477, 10832, 1000),
        ("c68d92d5b585d8d81f7112f81e2d0842", "e229e9440236b774d9f0dfef9d07bdaf",
         "0a97e76651ace45c5d943ee3f65b63ae", "abc493b6d529d5de7569faaef2773ba3"),
    ),
    "pneumoniamnist": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (4708, 524, 624),
        ("28209eda62fecd6e6a2d98b1501bb15f", "8f4eceb4ccffa70c672198ea285246c6",
         "05b46931834c231683c68f40c47b2971", "d6a3c71de1b945ea11211b03746c1fe1"),
    ),
    "retinamnist": MedMNISTSet(
        3, 5, "ordinal-regression", "CC BY 4.0", (1080, 120, 400),
        ("bd4c0672f1bba3e3a89f0e4e876791e4", "afda852cc34dcda56f86ad2b2457dbcc",
         "e48e916a24454daf90583d4e6efb1a18", "eae7e3b6f3fcbda4ae613ebdcbe35348"),
    ),
    "breastmnist": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (546, 78, 156),
        ("750601b1f35ba3300ea97c75c52ff8f6", "742edef2a1fd1524b2efff4bd7ba9364",
         "363e4b3f8d712e9b5de15470a2aaadf1", "b56378a6eefa9fed602bb16d192d4c8b"),
    ),
    "bloodmnist": MedMNISTSet(
        3, 8, "multi-class", "CC BY 4.0", (11959, 1712, 3421),
        ("7053d0359d879ad8a5505303e11de1dc", "2b94928a2ae4916078ca51e05b6b800b",
         "adace1e0ed228fccda1f39692059dd4c", "b718ff6835fcbdb22ba9eacccd7b2601"),
    ),
    "tissuemnist": MedMNISTSet(
        1, 8, "multi-class", "CC BY 4.0", (165466, 23640, 47280),
        ("ebe78ee8b05294063de985d821c1c34b", "123ece2eba09d0aa5d698fda57103344",
         "61b955355d7425a89687b06cca3ce0c2", "b077128c4a949f0a4eb01517f9037b9c"),
    ),
    "organamnist": MedMNISTSet(
        1, 11, "multi-class", "CC BY 4.0", (34561, 6491, 17778),
        ("68e3f8846a6bd62f0c9bf841c0d9eacc", "2dcccc29b88e6da5a01161ef20cda288",
         "eeae80d0a227a8d099027e1b3cfd3b60", "50747347e05c87dd3aaf92c49f9f3170"),
    ),
    "organcmnist": MedMNISTSet(
        1, 11, "multi-class", "CC BY 4.0", (12975, 2392, 8216),
        ("b9ceb9546e10131b32923c5bbeaea2b1", "3ce34a8724ea6f548e6db4744d03b6a9",
         "773c1f009daa3fe5d9a2a201b2a7ed94", "050f5e875dc056f6768abf94ec9995d1"),
    ),
    "organsmnist": MedMNISTSet(
        1, 11, "multi-class", "CC BY 4.0", (13932, 2452, 8827),
        ("9ab87b696fb54e2a387ebe992d6ed5f1", "53a6d115339d874c25e309a994ff46d3",
         "ded0c5fa01a95dc4978b956f613e9b8e", "b354719e553fbbb2513d5533f52a4cb1"),
    ),
    "organmnist3d": MedMNISTSet(
        1, 11, "multi-class", "CC BY 4.0", (971, 161, 610),
        ("a0c5a1ff56af4f155c46d46fbb45a2fe", "58a2205adf14a9d0a189cb06dc78bf10"),
    ),
    "nodulemnist3d": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (1158, 165, 310),
        ("8755a7e9e05a4d9ce80a24c3e7a256f3", "c47c5b7d457bf6332200d2ea6d64ecd8"),
    ),
    "adrenalmnist3d": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (1188, 98, 298),
        ("bbd3c5a5576322bc4cdfea780653b1ce", "17721accfe9fb005146a47d33bc54b2f"),
    ),
    "fracturemnist3d": MedMNISTSet(
        1, 3, "multi-class", "CC BY 4.0", (1027, 103, 240),
        ("6aa7b0143a6b42da40027a9dda61302f", "f01d7e6316aedf4210da0da5b7437b42"),
    ),
    "vesselmnist3d": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (1335, 191, 382),
        ("b41fd4f7e7e2feedddb201585ecafa1b", "6bb274a8846e1097066dcd64e2c4520f"),
    ),
    "synapsemnist3d": MedMNISTSet(
        1, 2, "binary-class", "CC BY 4.0", (1230, 177, 352),
        ("1235b78a3cd6280881dd7850a78eadb6", "43bd14ebf3af9d3dd072446fedc14d5e"),
    ),
}
# fmt: on

# Prefixes of the source photographs of the PBC set which say more than the class.
PBC_SUBTYPES = {
    "BNE": "band neutrophil",
    "SNE": "segmented neutrophil",
    "PMY": "promyelocyte",
    "MY": "myelocyte",
    "MMY": "metamyelocyte",
}


def load_medmnist(
    flag_or_path: str,
    split: str = "train",
    cache_dir: str | Path | None = None,
    base_url: str = BASE_URL,
    slice_axis: int | None = None,
    slices: int = 1,
) -> ImageDataset:
    """Load one split of a MedMNIST set, downloading it on first use, or of a local npz in the same format.

    Volumes become images by their central slices, see [`central_slices`], which keep the class of the volume.

    Args:
        flag_or_path (`str`): a flag ("pathmnist" is 28 pixels, "pathmnist_64" its 64 pixel version), or the path of an
            npz with `{split}_images` and `{split}_labels`. A file whose name starts with a flag gets the captions and
            the licence of that set.
        split (`str`): "train", "val" (or "validation"), "test", or whatever the file has.
        cache_dir (`str` or `Path`, *optional*): where downloads lie; default is the environment variable
            `VISBIO_CACHE`, else `~/.cache/visbio_diffusers`.
        base_url (`str`): where the files are fetched from.
        slice_axis (`int`, *optional*): axis across which volumes are cut: 0, 1 or 2; default is each of the three.
        slices (`int`): central slices of a volume and axis.

    Raises:
        ValueError: for an unknown flag, a missing split, files that are damaged or hold something else, and slices
            that a volume does not have.
        FileNotFoundError: if the path does not exist.
        OSError: if the download fails or has the wrong MD5.
    """
    cache = cache_folder(cache_dir)
    if str(flag_or_path).endswith(".npz"):
        path = Path(flag_or_path).expanduser()
        flag = next((flag for flag in MEDMNIST if path.stem.startswith(flag)), None)
        name = path.stem
    else:
        name = str(flag_or_path)
        flag, size = parse_flag(name)
        file_name = f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"
        md5 = MEDMNIST[flag].md5[SIZES.index(size)]
        path = download_file(f"{base_url}/{file_name}?download=1", cache / file_name, md5)
    split = "val" if split == "validation" else split
    images, labels = read_npz_split(path, split, cache, volumes=flag is not None and flag.endswith("3d"))
    if is_volumes(images):
        count = len(images)
        images = central_slices(images, slice_axis, slices)
        labels = np.repeat(labels, len(images) // count, axis=0)
    if flag is not None:
        _check_labels(path, labels, MEDMNIST[flag])
    return ImageDataset(
        name=name,
        split=split,
        images=images,
        labels=labels,
        subtypes=_read_subtypes(path, split, labels),
        class_names=None if flag is None else tuple(load_bank(flag).class_names),
        bank=flag,
        licence=None if flag is None else MEDMNIST[flag].licence,
    )


def central_slices(volumes: np.ndarray, axis: int | None = None, count: int = 1) -> np.ndarray:
    """Return the `count` slices next to the middle of each volume, across each of its three axes or one of them.

    The default gives three views of each volume, none like another, as the makers of OrganMNIST's 2-D sets cut the
    middles of theirs. Which axis is which plane of the body the files do not say, nor do the captions. (One of their
    makers calls the first axis axial, in issue 17 of MedMNIST's repository, of all sets alike.)

    Args:
        volumes (`np.ndarray` of shape `(n, depth, height, width)`).
        axis (`int`, *optional*): 0, 1 or 2: that of depth, height or width.
        count (`int`): slices for each axis.

    Returns:
        array of shape `(n * 3 * count, side, side)`, or `(n * count, ...)` for one axis: all slices of the first
        volume, by axis and place, then those of the next.

    Raises:
        ValueError: for an axis or more slices than there are, and for all axes of volumes that are no cubes.

    Source: Yang et al. 2023, MedMNIST v2 (2-D sets of OrganMNIST).
    """
    if axis not in (None, 0, 1, 2):
        raise ValueError(f"slice_axis={axis}: volumes have the axes 0, 1 and 2")
    axes = (0, 1, 2) if axis is None else (axis,)
    sides = volumes.shape[1:]
    if axis is None and len(set(sides)) > 1:
        raise ValueError(f"volumes of {sides} voxels are no cubes: choose one slice_axis")
    if not 1 <= count <= min(sides[axis] for axis in axes):
        raise ValueError(f"slices={count}: volumes of {sides} voxels have 1 to {min(sides[axis] for axis in axes)}")
    views = []
    for axis in axes:
        first = (sides[axis] - count) // 2
        views.append(np.moveaxis(volumes, axis + 1, 1)[:, first : first + count])
    cut = np.concatenate(views, axis=1)
    return cut.reshape(-1, *cut.shape[2:])


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the downloads: `cache_dir`, else `VISBIO_CACHE`, else `~/.cache/visbio_diffusers`."""
    return Path(cache_dir or os.environ.get("VISBIO_CACHE") or "~/.cache/visbio_diffusers").expanduser()


def parse_flag(name: str) -> tuple[str, int]:
    """Split "pathmnist_64" into the set and its size in pixels.

    Raises:
        ValueError: for a set or size that does not exist; names the nearest one.
    """
    match = re.fullmatch(r"(\w+?)(?:_(\d+))?", name)
    flag, size = (match[1], int(match[2] or 28)) if match else (name, 28)
    if flag not in MEDMNIST:
        nearest = difflib.get_close_matches(flag.lower(), MEDMNIST, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known sets: {', '.join(MEDMNIST)}"
        raise ValueError(f"unknown dataset {name!r}: {hint} A path, or a Hub set as owner/name, works too")
    if size not in MEDMNIST[flag].sizes:
        others = " or ".join(f"{flag}_{other}" for other in MEDMNIST[flag].sizes[1:])
        raise ValueError(f"{flag} has no size {size}: choose {flag} (28 pixels), {others}")
    return flag, size


def list_datasets(cache_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Return a row per MedMNIST set: name, classes, channels, task, licence, counts, sizes, sizes downloaded."""
    cache = cache_folder(cache_dir)
    return [
        {
            "name": flag,
            "num_classes": info.num_classes,
            "channels": info.channels,
            "task": info.task,
            "licence": info.licence,
            **dict(zip(("train", "val", "test"), info.num_samples, strict=True)),
            "sizes": info.sizes,
            "downloaded": tuple(s for s in info.sizes if (cache / f"{flag}{'' if s == 28 else f'_{s}'}.npz").exists()),
        }
        for flag, info in MEDMNIST.items()
    ]


def _check_labels(path: Path, labels: np.ndarray, info: MedMNISTSet) -> None:
    if labels.ndim == 2 and labels.shape[1] != info.num_classes:
        raise ValueError(f"{path}: labels have {labels.shape[1]} columns, its set has {info.num_classes} classes")
    if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < info.num_classes:
        raise ValueError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, its set has {info.num_classes} classes:"
            " rename the file if it is another set"
        )


def _read_subtypes(path: Path, split: str, labels: np.ndarray) -> list[str | None] | None:
    """Read the subtypes from `<stem>_index.csv` (split, index, label, pbc_file) beside the npz, if it is there."""
    index = path.with_name(f"{path.stem}_index.csv")
    if not index.exists():
        return None
    with index.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    rows.sort(key=lambda row: int(row["index"]))
    if [int(row["label"]) for row in rows] != labels.tolist():
        raise ValueError(f"{index} does not fit {path.name}: its labels of split {split} differ, remove or rebuild it")
    return [PBC_SUBTYPES.get(Path(row["pbc_file"]).name.split("_")[0]) for row in rows]
