"""Images found by a text or by an image, and texts found by an image; what was embedded once is kept in an index."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from visbio_diffusers.alignment.dual_encoder import DualEncoder
from visbio_diffusers.data import fit_image
from visbio_diffusers.data.corpus import read_json_lines, split_sentences
from visbio_diffusers.data.photograph import find_images, read_photograph
from visbio_diffusers.files import digest, whole_file


INDEX_NAME = "visbio-index.safetensors"
BATCH = 64
SAVE_EVERY = 50  # batches


class Found(NamedTuple):
    """One result: where it is (file, or PMID), its cosine, and the sentence that matched, empty for an image."""

    place: str
    cosine: float
    text: str = ""


class Index(NamedTuple):
    """Rows `(n, width)` of length 1, and for each what it is of."""

    rows: torch.Tensor
    entries: list[dict[str, Any]]


def nearest(index: Index, query: torch.Tensor, count: int) -> list[tuple[dict[str, Any], float]]:
    """Return the `count` entries with the highest cosine to `query` `(width,)`, the nearest first."""
    cosines = index.rows @ query
    best = cosines.topk(min(count, len(cosines)))
    return [(index.entries[row], float(cosine)) for cosine, row in zip(*best, strict=True)]


def index_images(encoder: DualEncoder, folder: Path, file: Path | None = None) -> Index:
    """Return the index of the images below a folder; those that are new or changed since are embedded.

    Args:
        encoder (`DualEncoder`): embeds them.
        folder (`Path`): images that cannot be read are named in a warning and left out.
        file (`Path`, *optional*): where the index is kept; by default in the folder.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds no images.
        ValueError: if the file was made by another model, or is damaged.
        OSError: if it cannot be written.
    """
    file = file or folder / INDEX_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: check the path")
    stamps = []
    for path in find_images([folder]):
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        stamps.append({"file": name, "size": status.st_size, "modified": status.st_mtime_ns})

    def read(entry: dict[str, Any]) -> Any:
        return fit_image(read_photograph(folder / entry["file"]), encoder.resolution)

    return _updated(encoder, file, stamps, read, encoder.embed_images, "looking at images")


def index_corpus(encoder: DualEncoder, corpus: Path, file: Path | None = None) -> Index:
    """Return the index of the sentences of a file of abstracts.

    Args:
        encoder (`DualEncoder`): embeds them.
        corpus (`Path`): JSON lines with `abstract` or `text`, and `pmid` and `title` where they are known.
        file (`Path`, *optional*): where the index is kept; by default beside the corpus.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no texts or lines that are no JSON, or the index was made by another model.
        OSError: if the index cannot be written.
    """
    if not corpus.is_file():
        raise FileNotFoundError(f"no file {corpus}: check the path")
    version, entries = digest(corpus)[:16], []
    for number, row in read_json_lines(corpus).items():
        text = row.get("abstract") or row.get("text") or ""
        name = str(row.get("pmid") or f"line {number}")
        for place, sentence in enumerate(split_sentences(f"{row.get('title') or ''} {text}")):
            entries.append({"pmid": name, "place": place, "sentence": sentence, "corpus": version})
    if not entries:
        raise ValueError(f"{corpus} holds no texts: each line needs a key abstract or text")
    file = file or corpus.with_name(f"{corpus.stem}-{INDEX_NAME}")
    return _updated(encoder, file, entries, lambda entry: entry["sentence"], encoder.embed_texts, "reading sentences")


def search_texts(index: Index, query: torch.Tensor, count: int) -> list[Found]:
    """Return the `count` abstracts of [`index_corpus`] with the sentences nearest to `query` `(width,)`."""
    best: dict[str, Found] = {}
    for entry, cosine in nearest(index, query, len(index.entries)):
        best.setdefault(entry["pmid"], Found(entry["pmid"], cosine, entry["sentence"]))
        if len(best) == count:
            break
    return list(best.values())


def _updated(
    encoder: DualEncoder,
    file: Path,
    wanted: Sequence[dict[str, Any]],
    read: Callable[[dict[str, Any]], Any],
    embed: Callable[[Sequence[Any]], torch.Tensor],
    title: str,
) -> Index:
    """Return the index of the entries wanted: taken from the file where it has them, embedded and kept otherwise."""
    old = _read(file, encoder) if file.exists() else Index(torch.empty(0, 0), [])
    known = {json.dumps(entry, sort_keys=True): row for row, entry in enumerate(old.entries)}
    keys = [json.dumps(entry, sort_keys=True) for entry in wanted]
    missing = [entry for entry, key in zip(wanted, keys, strict=True) if key not in known]
    entries = [entry for entry, key in zip(wanted, keys, strict=True) if key in known]
    rows = [old.rows[[known[key] for key in keys if key in known]]] if entries else []
    batches = list(_batches(missing))
    for number, some in enumerate(tqdm(batches, desc=title, disable=None if len(batches) > 10 else True), 1):
        good, content = [], []
        for entry in some:
            try:
                content.append(read(entry))
                good.append(entry)
            except ValueError as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
        if good:
            rows.append(embed(content))
            entries += good
        if number % SAVE_EVERY == 0 and entries:  # what was looked at until an interruption is kept
            _write(file, encoder, Index(torch.cat(rows), entries))
    if not entries:
        raise ValueError(f"nothing for the index {file} could be read: see the messages above")
    index = Index(torch.cat(rows), entries)
    if missing or len(entries) != len(old.entries):
        _write(file, encoder, index)
    return index


def _write(file: Path, encoder: DualEncoder, index: Index) -> None:
    content = torch.frombuffer(bytearray(json.dumps(index.entries).encode()), dtype=torch.uint8)
    with whole_file(file) as temporary:
        about = {"model": encoder.name, "sha256": encoder.sha256}
        save_file({"rows": index.rows.contiguous(), "entries": content}, temporary, metadata=about)


def _batches(entries: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]


def _read(file: Path, encoder: DualEncoder) -> Index:
    try:
        with safe_open(file, framework="pt") as opened:
            about, rows = opened.metadata(), opened.get_tensor("rows")
            entries = json.loads(opened.get_tensor("entries").numpy().tobytes())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the index {file} is damaged: remove it, and it is made again") from error
    if about.get("sha256") != encoder.sha256:
        raise ValueError(
            f"the index {file} was made by another model, {about.get('model')}: remove it, or name another by --index"
        )
    return Index(rows, entries)
