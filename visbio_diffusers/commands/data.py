"""The commands `visbio data ...`: list, preview, shards, pubmed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from visbio_diffusers.commands.arguments import positive, say, seed_number


# What a command needs beyond argparse is imported in its function, so that help and usage errors do not wait for it.

PUBMED_HELP = """\
Write abstracts of PubMed, or figure captions of PMC articles, as JSON lines.

  visbio data pubmed --query "eosinophils[mesh] AND 2020:2024[dp]" --email you@example.org --output abstracts.jsonl
  visbio data pubmed pubmed26n0001.xml.gz pubmed26n1335.xml.gz --output abstracts.jsonl
  visbio data pubmed article.nxml --output figures.jsonl

Files are PubMed XML (.xml, .xml.gz), MEDLINE text (.txt, .nbib) or PMC articles (.nxml). A fetch that was interrupted
goes on where it stopped when the same command is given again."""

SHARDS_HELP = """\
Pack a set of any kind into WebDataset shards, which train from a disk or from a web server.

  visbio data shards my_folder --output my_shards --split train --split val
  visbio data shards pathmnist_224 --output shards --format jpg --samples-per-shard 2000

A packing that was interrupted goes on where it stopped when the same command is given again."""


def add_actions(actions) -> None:
    """Add the commands to the subparsers of `visbio data`."""
    raw = argparse.RawDescriptionHelpFormatter
    listing = actions.add_parser("list", help="the MedMNIST sets: sizes, classes, licences")
    listing.set_defaults(run=_list)
    preview = actions.add_parser("preview", help="figures of a set, and a sheet of its images with captions")
    _add_preview_arguments(preview)
    preview.set_defaults(run=_preview)
    shards = actions.add_parser(
        "shards", help="pack a set of any kind into WebDataset shards", description=SHARDS_HELP, formatter_class=raw
    )
    _add_shards_arguments(shards)
    shards.set_defaults(run=_shards)
    summary = "abstracts of PubMed, of a query or of files, and figure captions of PMC"
    pubmed = actions.add_parser("pubmed", help=summary, description=PUBMED_HELP, formatter_class=raw)
    _add_pubmed_arguments(pubmed)
    pubmed.set_defaults(run=_pubmed, error=pubmed.error)


def _add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", help="a MedMNIST flag (downloaded on first use), an npz, a folder, a parquet file, a Hub set")
    add("--split", default="train", help="default: %(default)s; the others are searched for duplicates too")
    add("--num-images", type=positive, default=32, help="images on the sheet; default: %(default)s")
    add("--seed", type=seed_number, default=0, help="of the choice and the captions; default: %(default)s")
    _add_set_arguments(parser)
    add("--text-encoder", default="visbio-blood-28", help="counts the tokens of captions; default: %(default)s")
    add("--output", type=Path, default=Path("preview.png"), help="the sheet; default: %(default)s")
    add("--json", type=Path, help="a file for all figures")


SET_OPTIONS = (
    *("image_column", "caption_column", "label_column", "caption_bank", "slice_axis", "slices", "streaming"),
    *("allow_pipe", "tile_size", "tile_overlap", "min_object_area", "object_name", "channel_names", "resolution"),
)


def _add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a set is read; all but the set and its split are in SET_OPTIONS."""
    add = parser.add_argument_group("how the set is read").add_argument
    add("--resolution", type=positive, help="side in pixels; default: as they are")
    add("--image-column", default="image", help="default: %(default)s")
    add("--caption-column", default="text", help="default: %(default)s")
    add("--label-column", default="label", help="default: %(default)s")
    add("--caption-bank", help="describes the classes of a set that is not MedMNIST's")
    add("--streaming", action="store_true", help="fetch parquet files and Hub sets file by file")
    add("--allow-pipe", action="store_true", help="let shards be the output of a shell command, pipe:COMMAND")
    add("--slice-axis", type=int, choices=(0, 1, 2), help="across which volumes are cut; default: each of the three")
    add("--slices", type=positive, default=1, help="of a volume, for each axis; default: %(default)s")
    add = parser.add_argument_group("photographs in Cellpose's layout").add_argument
    add("--tile-size", type=positive, default=64, help="side of a tile; default: %(default)s")
    add("--tile-overlap", type=float, default=0.0, help="share of a tile; default: %(default)s")
    add("--min-object-area", type=float, default=0.01, help="share of a tile; default: %(default)s")
    add("--object-name", default="nucleus", help="what the masks show; default: %(default)s")
    add("--channel-names", nargs="+", default=[], help="default: as in the file")


def _add_shards_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", help="a MedMNIST flag, an npz, a folder, a Hub set, shards")
    add("--output", type=Path, required=True, help="folder, with one in it for each split")
    add("--split", action="append", help="default: train; may be given several times")
    _add_set_arguments(parser)
    add("--format", choices=("png", "jpg", "original"), default="png", help="default: %(default)s")
    add("--quality", type=positive, default=95, help="of JPEG; default: %(default)s")
    add("--samples-per-shard", type=positive, default=4096, help="default: %(default)s")
    add("--num-workers", type=positive, default=os.cpu_count(), help="shards written at a time; default: all cores")


def _add_pubmed_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="files to convert, unless --query is given")
    add("--query", help="what PubMed shall look for, in its own language")
    add("--email", help="yours: NCBI asks for it")
    add("--output", type=Path, required=True, help="the JSON lines, .jsonl")
    add("--max-results", "--max_results", type=int, help="keep the first so many of PubMed's list; default: all")
    add("--api-key", "--api_key", help="for 10 requests a second instead of 3; default: the variable NCBI_API_KEY")
    add("--base-url", "--base_url", help="of the E-utilities; default: NCBI's")


def _list(args: argparse.Namespace) -> None:
    from visbio_diffusers.data import list_datasets

    columns = ("flag", "train", "val", "test", "classes", "channels", "task", "licence", "sizes", "downloaded")
    rows = [columns]
    for row in list_datasets():
        counts = [row[name] for name in ("train", "val", "test", "num_classes", "channels")]
        sizes, downloaded = (" ".join(map(str, row[name])) for name in ("sizes", "downloaded"))
        rows.append((row["name"], *map(str, counts), row["task"], row["licence"], sizes, downloaded or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _preview(args: argparse.Namespace) -> None:
    from visbio_diffusers.commands.preview import preview_lines

    options = {name: getattr(args, name) for name in SET_OPTIONS}
    sheet = args.output, args.num_images, args.seed
    for line in preview_lines(args.dataset, args.split, *sheet, args.text_encoder, args.json, **options):
        say(line)


def _shards(args: argparse.Namespace) -> None:
    from visbio_diffusers.data import load_image_dataset
    from visbio_diffusers.data.pack import Packing, pack_shards

    options = {name: getattr(args, name) for name in SET_OPTIONS}
    packing = Packing(
        image_format=args.format,
        quality=args.quality,
        samples_per_shard=args.samples_per_shard,
        source=args.dataset,
        options=options,
    )
    for split in args.split or ["train"]:
        dataset = load_image_dataset(args.dataset, split, **options)
        folder = args.output / {"validation": "val"}.get(dataset.split, dataset.split)
        manifest = pack_shards(dataset, folder, packing, args.num_workers)
        for reason in (reason for shard in manifest["shards"] for reason in shard["left_out"]):
            say(f"left out: {reason}")
        say(f"{manifest['num_samples']} images in {len(manifest['shards'])} shards: {folder}")


def _pubmed(args: argparse.Namespace) -> None:
    if (args.query is None) == (not args.files):
        args.error("give either files or --query")
    if args.query is not None and args.email is None:
        args.error("--query needs --email: NCBI asks for yours")
    from visbio_diffusers.data import entrez
    from visbio_diffusers.data.pubmed import convert_pubmed

    if args.files:
        count = convert_pubmed(args.files, args.output)
    else:
        key, url = args.api_key or os.environ.get("NCBI_API_KEY"), args.base_url or entrez.BASE_URL
        count = entrez.fetch_pubmed(args.query, args.output, args.email, args.max_results, key, url)
    say(f"{args.output}: {count} rows")
