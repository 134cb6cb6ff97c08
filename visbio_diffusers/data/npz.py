"""Reading of npz files in MedMNIST's format: lazily per array, without pickle, with large arrays memory-mapped."""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from visbio_diffusers.data.dataset import MissingSplitError
from visbio_diffusers.files import whole_file


logger = logging.getLogger(__name__)

MAP_ABOVE_BYTES = 2**30  # larger arrays are unpacked once into the cache and memory-mapped


def read_npz_split(path: str | Path, split: str, cache: Path, volumes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and labels of one split, and nothing else, from an npz.

    Args:
        path (`str` or `Path`): npz with `{split}_images` and `{split}_labels`.
        split (`str`): prefix of the keys.
        cache (`Path`): where arrays above 1 GiB are unpacked, to be memory-mapped.
        volumes (`bool`): whether images may have a depth.

    Returns:
        uint8 images of shape `(n, height, width)`, `(n, height, width, 3)`, or `(n, depth, height, width)`; labels of
        shape `(n,)`, int64, or `(n, classes)`, 0/1 in uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, pickled, lacks the split, or holds arrays of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: check the path")
    with _open(path) as archive:
        keys = (f"{split}_images", f"{split}_labels")
        if not set(keys) <= set(archive.files):
            stems = {key.rpartition("_")[0] for key in archive.files}
            splits = sorted(stem for stem in stems if {f"{stem}_images", f"{stem}_labels"} <= set(archive.files))
            found = f"its splits are {', '.join(splits)}" if splits else f"its keys are {', '.join(archive.files)}"
            raise MissingSplitError(f"{path} has no {keys[0]} and {keys[1]}: {found}")
        images, labels = (_read_array(archive, path, key, cache) for key in keys)
    _check_arrays(path, split, images, labels, volumes)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return images, labels.astype(np.uint8)
    return images, labels.reshape(len(labels)).astype(np.int64)


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        zipfile.ZipFile(path).close()  # numpy would try to read anything else as a pickle
        return np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        message = f"{path} is not a whole npz file: it is cut short or of another format, get it again"
        raise ValueError(message) from error


def _read_array(archive: np.lib.npyio.NpzFile, path: Path, key: str, cache: Path) -> np.ndarray:
    try:
        if archive.zip.getinfo(f"{key}.npy").file_size > MAP_ABOVE_BYTES:
            return _map_array(archive.zip, path, key, cache)
        return archive[key]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged at {key} ({error}): get it again") from error
    except ValueError as error:
        if "allow_pickle" not in str(error) and "Python objects" not in str(error):
            raise ValueError(f"{path} is damaged at {key} ({error}): get it again") from error
        raise ValueError(
            f"{path} holds pickled objects at {key}, which are never loaded: save it as a plain uint8 array"
        ) from error


def _map_array(archive: zipfile.ZipFile, path: Path, key: str, cache: Path) -> np.ndarray:
    """Unpack a large array once; all processes and workers then share its pages."""
    status = path.stat()
    stamp = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache / "unpacked" / f"{path.stem}.{key}.{stamp}.npy"
    if not target.exists():
        logger.info("unpacking %s of %s to %s", key, path, target)
        with whole_file(target) as temporary:
            with archive.open(f"{key}.npy") as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**22)
            np.load(temporary, mmap_mode="r", allow_pickle=False)  # refused here, it leaves nothing behind
    return np.load(target, mmap_mode="r", allow_pickle=False)


def is_volumes(images: np.ndarray) -> bool:
    """Return whether an array holds images with a depth, not with colours."""
    return images.ndim == 4 and images.shape[3] not in (1, 3)


def _check_arrays(path: Path, split: str, images: np.ndarray, labels: np.ndarray, volumes: bool) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: {split}_images is {images.dtype}, it must be uint8 in [0, 255]: convert it")
    if images.ndim not in (3, 4) or (is_volumes(images) and not volumes):
        raise ValueError(
            f"{path}: {split}_images has shape {images.shape}, it must be (n, height, width) or (n, height, width, 3)"
        )
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2):
        raise ValueError(f"{path}: {split}_labels is {labels.dtype} of shape {labels.shape}, not integers (n, 1)")
    if len(images) != len(labels):
        raise ValueError(f"{path}: {len(images)} {split}_images but {len(labels)} {split}_labels: they must match")
    if len(images) == 0:
        raise ValueError(f"{path}: {split}_images is empty: choose another split or file")
