"""One WebDataset shard: a tar file in which members of the same name up to the first dot are one sample.

`000123.jpg` is the image (`.png`, `.tif` and others likewise), `000123.mask.png` its masks, `000123.txt` the caption,
`000123.cls` the class, `000123.json` an object that may hold all three. A shard is read once from end to end to make
its index, an Arrow table of where the images lie and what is said of them; after that any sample is read at once.
Nothing is unpacked to disk, and members of other kinds are left alone.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from visbio_diffusers.files import whole_file


if TYPE_CHECKING:
    import pyarrow

IMAGES = frozenset("png jpg jpeg jpe jfif jp2 tif tiff webp bmp gif ppm pgm".split())
MASKS = "mask.png"
TEXT_COLUMNS = "text", "caption"
MAX_TEXT_BYTES = 2**20  # of a caption or JSON object


def index_shard(path: Path, caption_column: str, label_column: str) -> pyarrow.Table:
    """Read a shard from end to end and return a row for each of its images.

    Args:
        path (`Path`): an uncompressed tar file.
        caption_column (`str`), label_column (`str`): keys of the JSON objects; for the caption `.txt` comes first, for
            the label `.cls`. The default "text" stands for "caption" too.

    Returns:
        `pyarrow.Table` with `key`, `offset` and `size` (int64, bytes), `mask_offset` and `mask_size`, `caption`,
        `label` (int64, null where unknown), `labels` (list of int8, of multi-label sets), `class` and `subtype`.

    Raises:
        ValueError: if it is no tar, cut short or compressed, holds links, devices, names that lead out of it, or
            images twice, or a text is not UTF-8 or no JSON; names shard and member.
    """
    samples: dict[str, dict[str, Any]] = {}
    for member, file in _members(path):
        key, _, suffix = member.name.rpartition("/")[2].partition(".")
        key, suffix = member.name[: -len(suffix) - 1] if suffix else member.name, suffix.lower()
        sample = samples.setdefault(key, {})
        if suffix in IMAGES or suffix == MASKS:
            place = "mask" if suffix == MASKS else "image"
            if place in sample:
                raise ValueError(f"{path}: {member.name} is a second {place} of one sample: give each its own name")
            sample[place] = member.offset_data, member.size
        elif suffix in ("txt", "json", "cls"):
            sample[suffix] = _text(path, member, file)
    rows = [
        {"key": key, **_row(path, key, sample, caption_column, label_column)}
        for key, sample in samples.items()
        if "image" in sample
    ]
    if not rows:
        raise ValueError(f"{path} holds no images: its samples need members such as 000000.jpg")
    import pyarrow

    return pyarrow.Table.from_pylist(rows, schema=index_schema())


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the files of a tar; refuse what could lead out of it, and an end that is missing."""
    try:
        with tarfile.open(path, "r:") as file:
            while (member := file.next()) is not None:
                name = PurePosixPath(member.name)
                if not member.name.isprintable():
                    raise ValueError(f"{path}: the name {ascii(member.name)} is not UTF-8: rename the member")
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise ValueError(f"{path}: member {member.name!r} leads out of the shard: such shards are refused")
                if member.isfile():
                    yield member, file
            file.fileobj.seek(file.offset)
            if file.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no member and no end at byte {file.offset}")
    except tarfile.ReadError as error:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        hint = "it is compressed: unpack it" if packed else f"it is cut short or no tar ({error}): get it again"
        raise ValueError(f"cannot read shard {path}: {hint}") from error


def _text(path: Path, member: tarfile.TarInfo, file: tarfile.TarFile) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: {member.name} has {member.size} bytes, a text at most {MAX_TEXT_BYTES}")
    try:
        return file.extractfile(member).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {member.name} is not UTF-8 ({error.reason}): write it in UTF-8") from error


def _row(path: Path, key: str, sample: dict[str, Any], caption_column: str, label_column: str) -> dict[str, Any]:
    try:
        about = json.loads(sample.get("json", "{}"))
        label = int(sample["cls"]) if "cls" in sample else about.get(label_column)
        subtype = about.get("subtype")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {key} has a .json that is no object, or a .cls that is no number") from error
    if not (label is None or isinstance(label, str) or _is_class(label) or _are_findings(label)):
        raise ValueError(f"{path}: {key} has the label {label!r}: it is a name, a number from 0, or a list of 0 and 1")
    if not isinstance(subtype, str | None):
        raise ValueError(f"{path}: {key} has the subtype {subtype!r}: it is a name")
    names = TEXT_COLUMNS if caption_column == TEXT_COLUMNS[0] else (caption_column,)
    found = next((about[name] for name in names if isinstance(about.get(name), str)), None)
    caption = sample.get("txt", found) if names is TEXT_COLUMNS else found
    row = {"offset": sample["image"][0], "size": sample["image"][1], "caption": caption and caption.strip()}
    if "mask" in sample:
        row |= {"mask_offset": sample["mask"][0], "mask_size": sample["mask"][1]}
    if isinstance(label, list):
        row["labels"] = label
    elif isinstance(label, str):
        row["class"] = label
    else:
        row["label"] = label
    return {**row, "subtype": subtype}


def _is_class(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**31


def _are_findings(label: Any) -> bool:
    return (
        isinstance(label, list) and len(label) > 0 and all(type(value) is int and value in (0, 1) for value in label)
    )


def index_schema() -> pyarrow.Schema:
    """Return the columns of an index."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    return pyarrow.schema(
        {
            "key": text,
            "offset": number,
            "size": number,
            "mask_offset": number,
            "mask_size": number,
            "caption": text,
            "label": number,
            "labels": pyarrow.list_(pyarrow.int8()),
            "class": text,
            "subtype": text,
        }
    )


def write_index(table: pyarrow.Table, path: Path) -> None:
    """Write the index of a shard as an Arrow file."""
    import pyarrow

    with whole_file(path) as temporary, pyarrow.OSFile(str(temporary), "wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def read_index(path: Path) -> pyarrow.Table:
    """Return the index in an Arrow file, memory-mapped.

    Raises:
        ValueError: if it is damaged, or no index.
    """
    import pyarrow

    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"the index {path} is damaged: delete it, and the set is read anew") from error
    if table.schema != index_schema():
        raise ValueError(f"the index {path} is of another version: delete it, and the set is read anew")
    return table
