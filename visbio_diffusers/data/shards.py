"""Sets in shards, of any size: WebDataset tar files here or elsewhere, read in any order through their indices.

A set that `visbio data shards` has packed is a folder for each split, with `000000.tar`, its index `000000.arrow`, and
`manifest.json`. Shards of other origin have no index: theirs are made on first use, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from tqdm.auto import tqdm

from visbio_diffusers.captions import available_banks
from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError
from visbio_diffusers.data.medmnist import MEDMNIST
from visbio_diffusers.data.photograph import SUFFIXES
from visbio_diffusers.data.remote import LIMIT_VARIABLE, PIPE, RemoteFiles, is_remote
from visbio_diffusers.data.sampler import LANES, WINDOW
from visbio_diffusers.data.shard_images import Shard, ShardImages, ShardMasks, Texts
from visbio_diffusers.data.webdataset import TEXT_COLUMNS, index_shard, read_index, write_index


if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ALIASES = {"val": ("validation",), "validation": ("val",)}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FILE = re.compile(r"\w[\w.-]*\.tar")


def is_shards(name: str) -> bool:
    """Return whether a name means shards: an address of tar files or of a manifest, or a folder that holds such."""
    place = urlsplit(name).path if is_remote(name) else name
    if name.startswith(PIPE) or place.endswith(".tar") or Path(place).name == MANIFEST:
        return True
    folder = Path(name).expanduser()
    if name.partition("_")[0] in MEDMNIST or not folder.is_dir():
        return False
    return any(map(_holds_shards, [folder, *(inner for inner in folder.iterdir() if inner.is_dir())]))


def _holds_shards(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours, or tar files and no images or parquet files beside them."""
    manifest = folder / MANIFEST
    if manifest.exists() and '"shards"' in manifest.read_text(encoding="utf-8", errors="replace"):
        return True
    if next(folder.glob("*.tar"), None) is None:
        return False
    return not any(path.suffix.lower() in (*SUFFIXES, ".parquet") for path in folder.iterdir())


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
    _check_room(shards, manifest, files)
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
        captions = _captions(
            table,
            shards,
            starts,
            caption_column,
            optional=bare or (class_names is not None and caption_column == TEXT_COLUMNS[0]),
        )
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
    splits = [split, *ALIASES.get(split, ())]
    if not is_remote(name) and Path(name).expanduser().is_dir():
        return _of_address(_in_folder(Path(name).expanduser(), splits), splits, files)
    if "{split}" in name:
        for each in splits[:-1]:
            try:
                return _of_address(name.replace("{split}", each), splits, files)
            except OSError:
                continue
        return _of_address(name.replace("{split}", splits[-1]), splits, files)
    if split != "train" and not name.endswith(MANIFEST):
        raise MissingSplitError(
            f"{name} are the shards of one split: put {{split}} into the address to have {split!r} too"
        )
    return _of_address(name, splits, files)


def _of_address(address: str, splits: Sequence[str], files: RemoteFiles) -> tuple[list[Shard], dict[str, Any]]:
    if Path(urlsplit(address).path).name == MANIFEST:
        return _of_manifest(address, splits, files)
    if address.startswith(PIPE):
        return [Shard(f"{PIPE}{each}") for each in expand(address.removeprefix(PIPE))], {}
    return [Shard(each) for pattern in expand(address) for each in _glob(pattern)], {}


def _in_folder(folder: Path, splits: Sequence[str]) -> str:
    """Return the address of a split in a folder: a manifest, or a pattern of tar files."""
    for split in splits:
        if (folder / split / MANIFEST).exists():
            return str(folder / split / MANIFEST)
        if next((folder / split).glob("*.tar"), None):
            return str(folder / split / "*.tar")
        if next(folder.glob(f"*{split}*.tar"), None):
            return str(folder / f"*{split}*.tar")
    if (folder / MANIFEST).exists():
        return str(folder / MANIFEST)
    others = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    named = [path.name for path in folder.glob("*.tar") if re.search("val|test", path.name)]
    if splits[0] == "train" and not others and not named:
        return str(folder / "*.tar")
    raise MissingSplitError(f"{folder} has no split {splits[0]!r}: it has {', '.join(others or named) or 'train'}")


def _of_manifest(address: str, splits: Sequence[str], files: RemoteFiles) -> tuple[list[Shard], dict[str, Any]]:
    address = address if is_remote(address) else str(Path(address).expanduser())
    base, content = address.removesuffix(MANIFEST), files.fresh(address)
    try:
        manifest = json.loads(content)
        split, shards = str(manifest["split"]), []
        for each in manifest["shards"]:
            file, index = str(each["file"]), str(each["file"]).removesuffix(".tar") + ".arrow"
            if not _FILE.fullmatch(file):
                raise ValueError(f"it names the file {file!r}, which is none of its folder")
            if each["num_samples"]:
                sums = str(each["sha256"]), str(each["index_sha256"])
                shards.append(Shard(base + file, base + index, int(each["num_bytes"]), *sums))
    except (ValueError, KeyError, TypeError) as error:
        reason = error if "names the file" in str(error) else "or damaged: pack the set again"
        raise ValueError(f"{address} is no manifest of shards, {reason}") from error
    if not manifest.get("complete"):
        raise ValueError(f"{address} is of a set that is not packed to its end: give the same command again")
    if split not in splits:
        raise MissingSplitError(f"{address} has no split {splits[0]!r}: it has {split}")
    for shard in shards:
        path = Path(shard.address)
        if not is_remote(shard.address) and (not path.exists() or path.stat().st_size != shard.num_bytes):
            raise ValueError(f"{path} is missing, or not as long as {MANIFEST} says: get it again")
    manifest["bank"] = manifest.get("bank") if manifest.get("bank") in available_banks() else None
    return shards, manifest


def _check_room(shards: Sequence[Shard], manifest: dict[str, Any], files: RemoteFiles) -> None:
    """Warn where the shards that are in use at a time exceed the room for remote ones."""
    if not manifest or not is_remote(shards[0].address):
        return
    samples = max(1, manifest["num_samples"] // len(shards))
    used = min(len(shards), LANES * (WINDOW // samples + 2)) * max(shard.num_bytes for shard in shards)
    if used > files.limit:
        logger.warning(
            f"{used / 2**30:.1f} GB of shards are in use at a time, more than {LIMIT_VARIABLE} allows: they will be "
            "fetched again and again"
        )


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
    if path.exists():
        return [str(path)]
    found = sorted(map(str, path.parent.glob(path.name)))
    if not found:
        raise FileNotFoundError(f"no shard {pattern}: check the path")
    return found


def _plain_name(name: str) -> str:
    return Path(_RANGE.sub("", name.replace("{split}", ""))).stem.strip("-_*") or "shards"


def _index(shard: Shard, files: RemoteFiles, cache: Path, caption_column: str, label_column: str) -> pyarrow.Table:
    """Return the index of a shard: the one beside it, or the one in the cache, which is made if it is not there."""
    if shard.index and (is_remote(shard.index) or Path(shard.index).exists()):
        return files.use(shard.index, read_index, shard.index_sha256)
    mark = shard.address
    if not is_remote(mark):
        status = Path(mark).stat()
        mark = f"{Path(mark).resolve()} {status.st_size} {status.st_mtime_ns}"
    stamp = hashlib.sha256(f"{mark} {caption_column} {label_column}".encode()).hexdigest()[:16]
    index = cache / "indices" / f"{stamp}.arrow"
    if not index.exists():
        try:
            table = files.use(shard.address, lambda path: index_shard(path, caption_column, label_column))
        except ValueError:
            files.forget(shard.address)
            raise
        write_index(table, index)
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
