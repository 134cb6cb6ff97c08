"""Packing of any image set into WebDataset shards, several at a time, with an index and a manifest.

A shard is written whole or not at all, and noted in the manifest at once, so that a packing which was interrupted goes
on where it stopped. The same set and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm.auto import tqdm

from visbio_diffusers.captions import CaptionBank, available_banks, load_bank
from visbio_diffusers.data.dataset import ImageDataset
from visbio_diffusers.data.pools import plain_caption
from visbio_diffusers.data.shards import MANIFEST
from visbio_diffusers.data.webdataset import IMAGES, index_shard, write_index
from visbio_diffusers.files import PREFIX, digest, whole_file


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a set is packed.

    Args:
        image_format (`str`): "png", "jpg", or "original" for the files of the set as they are.
        quality (`int`): of JPEG, 1 to 100; colours are not subsampled.
        samples_per_shard (`int`): images in each shard but the last.
        source (`str`), options (`dict`): what was packed, as it would be loaded again.
    """

    image_format: Literal["png", "jpg", "original"] = "png"
    quality: int = 95
    samples_per_shard: int = 4096
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def pack_shards(dataset: ImageDataset, folder: str | Path, packing: Packing, num_workers: int = 1) -> dict[str, Any]:
    """Write a set to `folder` as shards in random order, and return the manifest.

    Args:
        dataset (`ImageDataset`): one split of any set.
        folder (`str` or `Path`): where the shards go.
        packing (`Packing`): the form.
        num_workers (`int`): shards that are written at a time, by threads.

    Returns:
        what `manifest.json` holds: `name`, `split`, `licence`, `class_names`, `bank`, `num_samples`, `packing`, and of
        each of the `shards` its `file`, `num_samples`, `num_bytes`, `sha256`, `index_sha256` and `left_out` (what
        cannot be read, and why).

    Raises:
        ValueError: for a folder that was packed from another set, with other settings, or is being packed, for a set
            without files of its own where "original" is asked for, and if no image can be read.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    if packing.image_format == "original" and (dataset.resolution or not hasattr(dataset.images, "encoded")):
        raise ValueError(f"{dataset.name} has no image files to keep, or they are resized: choose png or jpg")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _pack(dataset, folder, packing, num_workers)
    except Timeout as error:
        raise ValueError(f"{folder} is being packed by another process: wait for it, or choose another") from error


def _pack(dataset: ImageDataset, folder: Path, packing: Packing, num_workers: int) -> dict[str, Any]:
    for leftover in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    bank = None if dataset.bank is None else load_bank(dataset.bank)
    manifest = _begin(dataset, bank, folder / MANIFEST, packing)
    order = np.random.default_rng(0).permutation(len(dataset))
    size = packing.samples_per_shard
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    done = {entry["file"] for entry in manifest["shards"]}
    missing = {number: rows for number, rows in enumerate(parts) if _file_name(number) not in done}
    packed = sum(entry["num_samples"] for entry in manifest["shards"])
    bar = tqdm(desc="packing", total=len(order), unit="image", initial=packed)
    with bar, ThreadPoolExecutor(num_workers) as pool:
        tasks = [
            pool.submit(_write_shard, dataset, bank, rows, packing, folder / _file_name(number), bar)
            for number, rows in missing.items()
        ]
        try:
            for task in as_completed(tasks):
                manifest["shards"] = sorted([*manifest["shards"], task.result()], key=lambda each: each["file"])
                _save(manifest, folder / MANIFEST)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    manifest["num_samples"] = sum(entry["num_samples"] for entry in manifest["shards"])
    if not manifest["num_samples"]:
        raise ValueError(
            f"no image of {dataset.name} can be read, the first is {manifest['shards'][0]['left_out'][0]}"
        )
    _save({**manifest, "complete": True}, folder / MANIFEST)
    return {**manifest, "complete": True}


def _begin(dataset: ImageDataset, bank: CaptionBank | None, path: Path, packing: Packing) -> dict[str, Any]:
    """Return the manifest of a packing to go on with, or a new one."""
    shipped = dataset.bank is not None and dataset.bank in available_banks()
    manifest = {
        "name": dataset.name,
        "split": {"validation": "val"}.get(dataset.split, dataset.split),
        "licence": dataset.licence,
        "class_names": None if dataset.class_names is None else list(dataset.class_names),
        "bank": dataset.bank if shipped else None,
        "packing": {
            **asdict(packing),
            "images": len(dataset),
            "resolution": dataset.resolution,
            "said": _said(dataset, bank),
        },
        "complete": False,
        "shards": [],
    }
    if not path.exists():
        return manifest
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found[name] == manifest[name] for name in ("name", "split", "class_names", "bank", "packing"))
        whole = [entry for entry in found["shards"] if _is_whole(path.with_name(entry["file"]), entry)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete its folder and pack again") from error
    if not same:
        raise ValueError(f"{path.parent} was packed from another set or with other settings: choose another folder")
    return {**found, "complete": False, "shards": whole}


def _said(dataset: ImageDataset, bank: CaptionBank | None) -> str:
    """Return a digest of all labels, subtypes and captions, and of the words of a bank."""
    found = hashlib.sha256(repr(bank).encode())
    for column in (dataset.labels, dataset.subtypes, dataset.captions):
        found.update(column.tobytes() if isinstance(column, np.ndarray) else b"|")
        for text in column if column is not None and not isinstance(column, np.ndarray) else ():
            found.update(f"{text}\n".encode())
    return found.hexdigest()[:16]


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    if not entry["num_samples"]:
        return True
    return path.exists() and path.stat().st_size == entry["num_bytes"] and path.with_suffix(".arrow").exists()


def _save(manifest: dict[str, Any], path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _file_name(number: int) -> str:
    return f"{number:06d}.tar"


def _write_shard(
    dataset: ImageDataset, bank: CaptionBank | None, rows: np.ndarray, packing: Packing, path: Path, bar: tqdm
) -> dict[str, Any]:
    """Write one shard and its index, unless none of its images can be read; return its entry in the manifest."""
    entry: dict[str, Any] = {"file": path.name, "num_samples": 0, "num_bytes": 0, "sha256": "", "left_out": []}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=PREFIX) as folder:
        shard = Path(folder, path.name)
        with tarfile.open(shard, "w") as file:
            for row in rows.tolist():
                bar.update()
                try:
                    members = _members(dataset, bank, row, packing)
                except ValueError as error:
                    entry["left_out"].append(str(error))
                    continue
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
        if len(entry["left_out"]) == len(rows):
            return entry
        table = index_shard(shard, "text", "label")
        assert len(table) == len(rows) - len(entry["left_out"]), "each sample is in the index"
        index = path.with_suffix(".arrow")
        write_index(table, index)
        entry |= {"num_samples": len(table), "num_bytes": shard.stat().st_size, "sha256": digest(shard)}
        with whole_file(path) as temporary:
            shard.rename(temporary)
    return {**entry, "index_sha256": digest(index)}


def _members(dataset: ImageDataset, bank: CaptionBank | None, row: int, packing: Packing) -> dict[str, bytes]:
    """Return the files of one sample by their suffix."""
    item = dataset[row] if packing.image_format != "original" else dataset.about(row)
    label, subtype = item["label"], item["subtype"]
    about: dict[str, Any] = {}
    if label is not None:
        about["label"] = label if np.ndim(label) == 0 else [int(value) for value in label]
    if dataset.class_names is not None and np.ndim(label) == 0 and label is not None:
        about["class_name"] = dataset.class_names[label]
    if subtype is not None:
        about["subtype"] = subtype
    members = dict([_image(dataset, row, item, packing)])
    if item.get("mask") is not None:
        members["mask.png"] = _png(Image.fromarray(item["mask"]))
    caption = _caption(dataset, bank, item)
    if caption:
        members["txt"] = caption.encode()
    if about:
        members["json"] = json.dumps(about).encode()
    return members


def _image(dataset: ImageDataset, row: int, item: dict[str, Any], packing: Packing) -> tuple[str, bytes]:
    if packing.image_format == "original":
        data = dataset.images.encoded(row)
        dataset.images[row]  # one that cannot be read is left out
        with Image.open(io.BytesIO(data)) as image:
            suffix = {"jpeg": "jpg", "jpeg2000": "jp2", "tiff": "tif"}.get(image.format.lower(), image.format.lower())
        if suffix not in IMAGES:
            raise ValueError(f"image {row} is of the format {suffix}, which shards do not hold: choose png or jpg")
        return suffix, data
    pixels = item["image"]
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if packing.image_format == "png":
        return "png", _png(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=packing.quality, subsampling=0)
    return "jpg", buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _caption(dataset: ImageDataset, bank: CaptionBank | None, item: dict[str, Any]) -> str | None:
    """Return the caption of an image, or the plain one of its class, for those who have no bank."""
    if item["caption"] is not None or item["label"] is None:
        return item["caption"]
    if bank is not None:
        return bank.plain_caption(item["label"], item["subtype"])
    single = dataset.class_names is not None and np.ndim(item["label"]) == 0
    return plain_caption(dataset.class_names[item["label"]]) if single else None
