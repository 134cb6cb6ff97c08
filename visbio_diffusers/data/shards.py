"""Sets in shards, of any size: WebDataset tar files here or elsewhere, read in any order through their indices.

A set that `visbio data shards` has packed is a folder for each split, with `000000.tar`, its index `000000.arrow`, and
`manifest.json`. Shards of other origin have no index: theirs are made on first use, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError
from visbio_diffusers.data.medmnist import MEDMNIST
from visbio_diffusers.data.remote import PIPE, RemoteFiles, is_remote
from visbio_diffusers.data.shard_images import Shard, ShardImages, ShardMasks, Texts
from visbio_diffusers.data.webdataset import index_shard, read_index, write_index


if TYPE_CHECKING:
    import pyarrow

MANIFEST = "manifest.json"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_shards(name: str) -> bool:
    """Return whether a name means shards: an address of tar files or of a manifest, or a folder that holds such."""
    if name.startswith(PIPE) or name.endswith((".tar", f"/{MANIFEST}")):
        return True
    folder = Path(name).expanduser()
    if name.partition("_")[0] in MEDMNIST or not folder.is_dir():
        return False
    return any(next(folder.glob(pattern), None) for pattern in ("*.tar", "*/*.tar", MANIFEST))


def load_shards(
    name: str,
    split: str,
    caption_column: str,
    label_column: str,
    captions_needed: bool,
    cache: Path,
    allow_pipe: bool = False,
    bare: bool = False,
) -> ImageDataset:
    """Load one split of a set in shards; images are read when they are asked for, remote shards when they are needed.

    Args:
        name (`str`): a folder, or an address of tar files or of a manifest: a path, a URL, or `pipe:COMMAND`. In it
            `{000..123}` stands for all these numbers and `{split}` for the split.
        split (`str`): name of the split.
        caption_column, label_column (`str`): see `index_shard`.
        captions_needed (`bool`): `False` if a caption bank speaks for the labels.
        cache (`Path`): where remote shards and indices are kept.
        allow_pipe (`bool`): see `RemoteFiles`.
        bare (`bool`): whether a set with neither captions nor classes is taken too.

    Raises:
        ValueError: for a missing split, shards that are damaged or not those of their manifest, and missing captions.
        FileNotFoundError: if there is no such file.
        OSError: if a remote file cannot be had.
    """
    files = RemoteFiles(cache / "shards", allow_pipe)
    shards, manifest = find_shards(name, split, files)
    tables = indices(shards, files, cache, caption_column, label_column)
    return assemble(name, split, shards, tables, files, manifest, captions_needed, caption_column, bare)


def indices(
    shards: Sequence[Shard], files: RemoteFiles, cache: Path, caption_column: str, label_column: str
) -> list[pyarrow.Table]:
    """Return the indices of tar files, several of which are made at a time where they do not exist."""
    with ThreadPoolExecutor() as pool:
        tables = pool.map(lambda shard: _index(shard, files, cache, caption_column, label_column), shards)
        return list(tqdm(tables, desc="reading indices", total=len(shards), disable=None))


def assemble(
    name: str,
    split: str,
    shards: Sequence[Shard],
    tables: Sequence[pyarrow.Table],
    files: RemoteFiles,
    manifest: dict[str, Any],
    captions_needed: bool,
    caption_column: str,
    bare: bool,
    images: Callable[..., ShardImages] = ShardImages,
) -> ImageDataset:
    """Return the set of shards whose indices are `tables`; the other arguments as in `load_shards`."""
    import pyarrow

    table = pyarrow.concat_tables(tables)
    starts = np.cumsum([0, *(len(each) for each in tables[:-1])])
    labels, class_names = _labels(table, manifest, name)
    bank = manifest.get("bank")
    captions = None
    if captions_needed and bank is None:
        captions = _captions(table, shards, starts, caption_column, optional=bare or class_names is not None)
    return ImageDataset(
        name=manifest.get("name") or _plain_name(name),
        split=split,
        images=images(tuple(shards), files, table.select(["key", "offset", "size"]), starts),
        labels=labels,
        captions=captions,
        subtypes=_subtypes(table, labels, class_names),
        class_names=class_names,
        bank=bank,
        licence=manifest.get("licence"),
        shard_starts=starts,
        masks=_masks(table, tuple(shards), files, starts),
    )


def _subtypes(table: pyarrow.Table, labels: np.ndarray | None, class_names: tuple[str, ...] | None) -> Texts | None:
    """Return the subtypes, without those that only repeat the class."""
    import pyarrow
    import pyarrow.compute as compute

    column = table["subtype"]
    if class_names is not None and labels is not None and labels.ndim == 1:
        repeated = compute.equal(column, pyarrow.array(class_names).take(pyarrow.array(labels)))
        column = compute.if_else(compute.fill_null(repeated, False), None, column)
    return None if column.null_count == len(column) else Texts(column)


def _masks(
    table: pyarrow.Table, shards: tuple[Shard, ...], files: RemoteFiles, starts: np.ndarray
) -> ShardMasks | None:
    if table["mask_offset"].null_count:
        return None
    places = table.select(["key", "mask_offset", "mask_size"]).rename_columns(["key", "offset", "size"])
    return ShardMasks(shards, files, places, starts)


def find_shards(name: str, split: str, files: RemoteFiles) -> tuple[list[Shard], dict[str, Any]]:
    """Return the shards of a split, and their manifest, which is empty for shards of other origin."""
    split = "val" if split == "validation" else split
    address = name.replace("{split}", split)
    if not is_remote(address) and Path(address).expanduser().is_dir():
        address = _in_folder(Path(address).expanduser(), split)
    if address.endswith(f"/{MANIFEST}"):
        return _of_manifest(address, split, files)
    addresses = [f"{PIPE}{each}" for each in expand(address.removeprefix(PIPE))] if address.startswith(PIPE) else None
    addresses = addresses or [each for pattern in expand(address) for each in _glob(pattern)]
    if split != "train" and "{split}" not in name and addresses == expand(name):
        raise MissingSplitError(
            f"{name} are the shards of one split: put {{split}} into the address to have {split!r} too"
        )
    return [Shard(each) for each in addresses], {}


def _in_folder(folder: Path, split: str) -> str:
    """Return the address of a split in a folder: a manifest, or a pattern of tar files."""
    for place in (folder / split, folder):
        if (place / MANIFEST).exists():
            return str(place / MANIFEST)
        if place != folder and next(place.glob("*.tar"), None):
            return str(place / "*.tar")
    if next(folder.glob(f"{split}*.tar"), None):
        return str(folder / f"{split}*.tar")
    if split == "train" and not next(folder.glob("*/*.tar"), None):
        return str(folder / "*.tar")
    splits = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    raise MissingSplitError(f"{folder} has no split {split!r}: it has {', '.join(splits) or 'train'}")


def _of_manifest(address: str, split: str, files: RemoteFiles) -> tuple[list[Shard], dict[str, Any]]:
    base = address.removesuffix(MANIFEST)
    try:
        manifest = json.loads(files.local(address).read_text(encoding="utf-8"))
        entries = [(each["file"], int(each["num_bytes"]), str(each["sha256"])) for each in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{address} is no manifest of shards, or damaged: pack the set again") from error
    if not manifest.get("complete"):
        raise ValueError(f"{address} is of a set that is not packed to its end: give the same command again")
    if manifest["split"] != split:
        raise MissingSplitError(f"{address} has no split {split!r}: it has {manifest['split']}")
    if any(Path(file).name != file for file, _, _ in entries):
        raise ValueError(f"{address} names shards outside of its folder: such manifests are refused")
    shards = [Shard(base + file, base + _index_name(file), size, sha256) for file, size, sha256 in entries]
    for shard in shards:
        path = Path(shard.address)
        if not is_remote(shard.address) and (not path.exists() or path.stat().st_size != shard.num_bytes):
            raise ValueError(f"{path} is missing, or not as long as {MANIFEST} says: get it again")
    return shards, manifest


def _index_name(file: str) -> str:
    return file.removesuffix(".tar") + ".arrow"


def expand(pattern: str) -> list[str]:
    """Return the addresses that a pattern means, in which `{000..123}` stands for each of these numbers."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise ValueError(f"{match[0]} in {pattern} names no shard: the first number is the smaller one")
    return [each for number in numbers for each in expand(pattern[: match.start()] + number + pattern[match.end() :])]


def _glob(pattern: str) -> list[str]:
    """Return the files that a pattern of paths means; URLs stay."""
    if is_remote(pattern):
        return [pattern]
    path = Path(pattern).expanduser()
    found = sorted(map(str, path.parent.glob(path.name)))
    if not found:
        raise FileNotFoundError(f"no shard {pattern}: check the path")
    return found


def _plain_name(name: str) -> str:
    return Path(_RANGE.sub("", name.replace("{split}", ""))).stem.strip("-_*") or "shards"


def _index(shard: Shard, files: RemoteFiles, cache: Path, caption_column: str, label_column: str) -> pyarrow.Table:
    """Return the index of a shard: the one beside it, or the one in the cache, which is made if it is not there."""
    if shard.index:
        return read_index(files.local(shard.index))
    mark = shard.address
    if not is_remote(mark):
        status = Path(mark).stat()
        mark = f"{Path(mark).resolve()} {status.st_size} {status.st_mtime_ns}"
    stamp = hashlib.sha256(f"{mark} {caption_column} {label_column}".encode()).hexdigest()[:16]
    index = cache / "indices" / f"{stamp}.arrow"
    if not index.exists():
        write_index(index_shard(files.local(shard.address), caption_column, label_column), index)
    return read_index(index)


def _labels(
    table: pyarrow.Table, manifest: dict[str, Any], name: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    names = manifest.get("class_names")
    for column in ("labels", "class", "label"):
        missing = table[column].null_count
        if missing == len(table):
            continue
        if missing:
            raise ValueError(f"{missing} of {len(table)} images of {name} have no label: remove or label them")
        if column == "label":
            return table[column].to_numpy().astype(np.int64), names and tuple(names)
        if column == "labels":
            return np.array(table[column].to_pylist(), dtype=np.uint8), names and tuple(names)
        encoded = table[column].combine_chunks().dictionary_encode()
        found = encoded.dictionary.to_pylist()
        order = np.argsort(found)
        rank = np.empty(len(found), dtype=np.int64)
        rank[order] = np.arange(len(found))
        return rank[encoded.indices.to_numpy()], tuple(found[place] for place in order)
    return None, names and tuple(names)


def _captions(
    table: pyarrow.Table, shards: Sequence[Shard], starts: np.ndarray, caption_column: str, optional: bool
) -> Texts | None:
    import pyarrow.compute as compute

    empty = compute.fill_null(compute.equal(table["caption"], ""), True)
    missing = compute.sum(empty).as_py()
    if not missing:
        return Texts(table["caption"])
    if optional and missing == len(table):
        return None
    row = compute.index(empty, True).as_py()
    shard = shards[int(np.searchsorted(starts, row, side="right")) - 1].address
    raise ValueError(
        f"{missing} of {len(table)} images have no caption, the first is {table['key'][row].as_py()} in {shard}: add "
        f"members .txt, or .json with {caption_column!r}, or choose with --caption_column"
    )
