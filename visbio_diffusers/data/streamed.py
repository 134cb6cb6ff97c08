"""Parquet files and Hub sets that are larger than the disk: their images come file by file, as a training needs them.

`datasets` finds the files of a set. Captions and labels of parquet files are read first, from the Hub without the
images, from web servers by fetching each file once. The images of a file come with it, and are then kept as Arrow in
the cache until there is need of its room. Hub sets of WebDataset shards are read as `data/shards.py` does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from visbio_diffusers.data.dataset import ImageDataset, MissingSplitError
from visbio_diffusers.data.folder import LABEL_COLUMN
from visbio_diffusers.data.remote import RemoteFiles, is_remote
from visbio_diffusers.data.shard_images import Shard, ShardImages
from visbio_diffusers.data.shards import assemble, expand, indices
from visbio_diffusers.data.webdataset import TEXT_COLUMNS, index_schema, read_index, write_index
from visbio_diffusers.files import one_line


if TYPE_CHECKING:
    import pyarrow


CLASS_NAMES = b"class_names"


def load_streamed(
    name: str,
    split: str,
    image_column: str,
    caption_column: str,
    label_column: str,
    captions_needed: bool,
    cache: Path,
    bare: bool = False,
) -> ImageDataset:
    """Load one split of parquet files or of a Hub set, and leave the images where they are.

    Args:
        name (`str`): a parquet file, a folder of them, "owner/name" of a Hub set, or the URL of parquet files, in
            which `{000..123}` stands for all these numbers and `{split}` for the split.
        split (`str`), image_column, caption_column, label_column (`str`), captions_needed, bare (`bool`): see
            `load_folder`.
        cache (`Path`): where files lie while they are in use.

    Raises:
        ValueError: if the set has no such split or columns, or is neither of parquet files nor of WebDataset shards.
        OSError: if a file cannot be had.
    """
    files, (addresses, kind) = RemoteFiles(cache / "shards"), find_files(name, split)
    shards = [Shard(address) for address in addresses]
    manifest: dict[str, Any] = {"name": Path(name).stem if Path(name).exists() else name}
    options = captions_needed, caption_column, bare
    if kind == "WebDataset":
        tables = indices(shards, files, cache, caption_column, label_column)
        return assemble(name, split, shards, tables, files, manifest, *options)
    bar = tqdm(addresses, desc="reading captions", disable=None)
    tables = [_index(address, files, cache, image_column, caption_column, label_column) for address in bar]
    manifest["class_names"] = json.loads((tables[0].schema.metadata or {}).get(CLASS_NAMES, b"null"))
    images = partial(ParquetImages, image_column=image_column)
    return assemble(name, split, shards, tables, files, manifest, *options, images)


def find_files(name: str, split: str) -> tuple[list[str], str]:
    """Return the addresses of the files of a split, and "Parquet" or "WebDataset"."""
    import datasets

    if is_remote(name):
        if split != "train" and "{split}" not in name:
            raise MissingSplitError(f"{name} is one split: put {{split}} into the address to have {split!r} too")
        return expand(name.replace("{split}", split)), "Parquet"
    path = Path(name).expanduser()
    if path.is_file():
        arguments = {"path": "parquet", "data_files": str(path)}
    else:
        arguments = {"path": "parquet", "data_dir": str(path)} if path.is_dir() else {"path": name}
    try:
        builder = datasets.load_dataset_builder(**arguments)
    except ConnectionError as error:
        raise OSError(f"no file or folder {name} here, and no Hub set within reach: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {one_line(error)}") from error
    kind, splits = type(builder).__name__, builder.config.data_files or {}
    if kind not in ("Parquet", "WebDataset"):
        raise ValueError(f"{name} is of {kind} files: parquet and WebDataset can be streamed, leave out --streaming")
    found = split if split in splits else {"val": "validation", "validation": "val"}.get(split)
    if found not in splits:
        raise MissingSplitError(f"{name} has no split {split!r}: it has {', '.join(map(str, splits))}")
    return list(map(str, splits[found])), kind


def _index(
    address: str, files: RemoteFiles, cache: Path, image_column: str, caption_column: str, label_column: str
) -> pyarrow.Table:
    """Return the index of a parquet file, in which the offset is the row; what is remote is read once."""
    stamp = hashlib.sha256(
        f"{address} {_state(address)} {image_column} {caption_column} {label_column}".encode()
    ).hexdigest()[:16]
    index = cache / "indices" / f"{stamp}.arrow"
    if not index.exists():
        with _open(address, files) as file:
            write_index(_read_columns(address, file, image_column, caption_column, label_column), index)
    return read_index(index)


def _state(address: str) -> str:
    if is_remote(address):
        return ""
    status = Path(address).stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _open(address: str, files: RemoteFiles):
    """Return a file of which any part can be read; for those of web servers it is brought here."""
    import fsspec

    if address.startswith(("https:", "http:")):
        return files.use(address, lambda path: path.open("rb"))
    return fsspec.open(address, "rb")


def _read_columns(address: str, file, image_column: str, caption_column: str, label_column: str) -> pyarrow.Table:
    """Read all but the images of a parquet file."""
    import datasets
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(file)
        names = schema.names
        captions = TEXT_COLUMNS if caption_column == TEXT_COLUMNS[0] else (caption_column,)
        caption = next((each for each in captions if each in names), None)
        wanted = [each for each in (caption, label_column, "subtype") if each in names]
        table = parquet.read_table(file, columns=wanted)
        count = parquet.read_metadata(file).num_rows
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"cannot read {address}: {one_line(error)}: get it again") from error
    if image_column not in names:
        raise ValueError(f"{address} has no column {image_column!r}, only {', '.join(names)}: choose --image_column")
    kind = schema.field(image_column).type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(f"column {image_column!r} of {address} is {kind}, no images as `datasets` writes them")
    columns = {name: pyarrow.nulls(count, index_schema().field(name).type) for name in index_schema().names}
    columns["key"] = pyarrow.array([f"row {row}" for row in range(count)])
    columns["offset"] = columns["size"] = pyarrow.array(range(count), pyarrow.int64())
    if label_column in names:
        columns[_label_kind(address, label_column, table[label_column].type)] = table[label_column]
    elif label_column != LABEL_COLUMN:
        raise ValueError(f"{address} has no column {label_column!r}, only {', '.join(names)}: choose --label_column")
    for name, source in (("caption", caption), ("subtype", "subtype" if "subtype" in names else None)):
        columns[name] = table[source] if source else columns[name]
    feature = datasets.Features.from_arrow_schema(schema).get(label_column)
    class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return pyarrow.table(columns).cast(index_schema().with_metadata({CLASS_NAMES: json.dumps(class_names)}))


def _label_kind(address: str, label_column: str, kind: pyarrow.DataType) -> str:
    """Return the column of an index for labels of this type."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(kind) or types.is_large_string(kind):
        return "class"
    if types.is_list(kind) or types.is_large_list(kind):
        return "labels"
    if types.is_integer(kind):
        return "label"
    raise ValueError(
        f"column {label_column!r} of {address} is {kind}: labels are names, integers, or lists of 0 and 1"
    )


@dataclass(frozen=True)
class ParquetImages(ShardImages):
    """The images of parquet files as a sequence of PIL images; see `ShardImages`.

    Args:
        image_column (`str`): of structs with `bytes`, as `datasets` writes images.
    """

    image_column: str = "image"

    def encoded(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        row = self._row(index)
        shard = self._shard(row)
        return self._file(shard)[self.image_column][self.index["offset"][row].as_py()]["bytes"].as_py()

    def _open(self, shard: int) -> pyarrow.Table:
        import pyarrow

        def read(path: Path) -> pyarrow.Table:
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()

        return self.files.use_converted(self.shards[shard].address, ".arrow", self._convert, read)

    def _is_removed(self, table: pyarrow.Table) -> bool:
        return False  # how a table is mapped is not known

    def _convert(self, source: Path, target: Path) -> None:
        """Write the images of a parquet file as Arrow, of which any row can be read at once."""
        import pyarrow
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(source) as file, pyarrow.OSFile(str(target), "wb") as sink:
            schema = pyarrow.schema([file.schema_arrow.field(self.image_column)])
            with pyarrow.ipc.new_file(sink, schema) as writer:
                for batch in file.iter_batches(1000, columns=[self.image_column]):
                    writer.write_batch(batch)
