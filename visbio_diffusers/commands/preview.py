"""What `visbio data preview` says of an image set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from visbio_diffusers.data import ImageDataset, MissingSplitError, load_image_dataset, preview
from visbio_diffusers.data.duplicates import MAX_DISTANCE, MIN_CORRELATION
from visbio_diffusers.data.preview import CaptionLengths
from visbio_diffusers.files import whole_file
from visbio_diffusers.load import load_text_encoder, quiet_loading
from visbio_diffusers.text import max_tokens


SPLITS = ("train", "val", "test")


def preview_lines(
    name: str,
    split: str,
    output: Path,
    num_images: int,
    seed: int,
    text_encoder: str,
    report: Path | None = None,
    **options: Any,
) -> Iterator[str]:
    """Look at a split of an image set, and yield what there is to say of it.

    Args:
        name (`str`), split (`str`): see `load_image_dataset`; its other splits are searched for duplicates.
        output (`Path`): the PNG to write.
        num_images (`int`), seed (`int`): of the sheet.
        text_encoder (`str`): whose tokens the captions are counted in, see `load_text_encoder`.
        report (`Path`, *optional*): JSON file for all figures.
        options: of `load_image_dataset`.

    Raises:
        ValueError, OSError: as `load_image_dataset`, `load_text_encoder` and `preview`.
    """
    dataset = load_image_dataset(name, split, bare=True, **options)
    with quiet_loading():
        encoder, tokenizer = load_text_encoder(text_encoder)
    lengths = CaptionLengths(tokenizer, max_tokens(tokenizer, encoder))
    others = list(_other_splits(name, dataset.split, options))
    figures = preview(dataset, output, num_images, seed, others, lengths)
    if report is not None:
        with whole_file(report) as temporary:
            temporary.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    yield from _image_lines(figures)
    yield from _caption_lines(figures, dataset, text_encoder)
    yield from _duplicate_lines(figures["duplicates"])
    yield str(output)


def _other_splits(name: str, split: str, options: dict[str, Any]) -> Iterator[ImageDataset]:
    for other in SPLITS:
        if other != {"validation": "val"}.get(split, split):
            with suppress(MissingSplitError):
                yield load_image_dataset(name, other, bare=True, **options)


def _image_lines(figures: dict[str, Any]) -> Iterator[str]:
    sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in _ends(figures)))
    licence = figures["licence"] or "licence unknown"
    yield f"{figures['name']}, {figures['split']}: {figures['num_images']} images of {sizes} pixels, {licence}"
    if figures["smallest"] != figures["largest"]:
        for (height, width), count in figures["sizes"]:
            yield f"size {f'{height} x {width}'.ljust(11)}  {count:7d}"
    for channel, values in figures["intensity"].items():
        yield f"intensity {channel.ljust(5)}  " + ", ".join(f"{name} {value}" for name, value in values.items())
    for title in ("class", "subtype"):
        counts = figures[f"{title}_counts"] or {}
        width = max(map(len, counts), default=0)
        for name, count in counts.items():
            yield f"{title} {name.ljust(width)}  {count:7d}"


def _ends(figures: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    return figures["smallest"], figures["largest"]


def _caption_lines(figures: dict[str, Any], dataset: ImageDataset, text_encoder: str) -> Iterator[str]:
    tokens = figures["tokens"]
    if tokens is None:
        if dataset.labels is not None:
            yield "no captions: give a --caption-bank that describes the labels"
        else:
            yield (
                "no captions: write metadata.jsonl beside the images, for each a line"
                ' {"file_name": "1.png", "text": "what it shows"}; or name their column with --caption-column;'
                " or sort the images into one folder for each class"
            )
        return
    yield f"captions: {tokens['captions']}, of at most {tokens['longest']} tokens ({text_encoder}: {tokens['limit']})"
    if tokens["too_long"]:
        yield f"{tokens['too_long']} captions are cut, such as: {tokens['example']}"


def _duplicate_lines(duplicates: dict[str, Any]) -> Iterator[str]:
    splits = ", ".join(f"{name} {count}" for name, count in duplicates["splits"].items())
    kinds = {
        "exact": "the same pixels",
        "near": f"nearly the same look (pHash within {MAX_DISTANCE} of 64 bits, correlation {MIN_CORRELATION})",
    }
    for kind, title in kinds.items():
        found = duplicates[kind]
        if not found["groups"]:
            yield f"{title}: none in {splits}"
            continue
        yield (
            f"{title}: groups {found['groups']}, across splits {found['across_splits']}, of different classes"
            f" {found['in_conflict']}; images {found['images']} of {splits}"
        )
        for group in found["first"]:
            yield f"  {' = '.join(group) if kind == 'exact' else ' ~ '.join(group)}"
