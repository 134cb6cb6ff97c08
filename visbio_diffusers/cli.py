"""The command `visbio`: draw, redraw, explain, describe and search images, try, measure and audit models, sets.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Mistakes are answered in one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from visbio_diffusers import __version__
from visbio_diffusers.commands import data as data_commands
from visbio_diffusers.commands import demo as demo_command
from visbio_diffusers.commands import explain as explain_command
from visbio_diffusers.commands import redraw as redraw_commands
from visbio_diffusers.commands.arguments import device_name, positive, say, seed_number
from visbio_diffusers.files import one_line


# What a command needs beyond argparse is imported in its function, so that help and usage errors do not wait for it.

GENERATE_HELP = """\
Draw images from descriptions, or a balanced labelled set for a classifier.

  visbio generate "a segmented neutrophil, Wright-Giemsa stain" --num-images 8 --output out.png
  visbio generate --dataset bloodmnist --per-class 1000 --format imagefolder --output synthetic-blood

Each image has its own seed (in its metadata), and is drawn from torch.Generator().manual_seed(seed): image k of a
prompt has --seed + k, image i of a set --seed + i. It does not depend on the batch size or the number of images.
A set that was interrupted goes on where it stopped when the same command is given again."""


DESCRIBE_HELP = """\
Say what images show: captions with their probabilities, or "none of these" where none fits.

  visbio describe cell.png other.tif
  visbio describe my_folder --captions my_captions.txt
  visbio describe cell.png --explain why.png

Images are PNG, JPEG, TIFF and others, of any size; the middle square is looked at. Grey is spread to three colours,
transparent parts lie on white, values of more than 8 bits are stretched from their 1st to their 99.8th percentile."""

SEARCH_HELP = """\
Find images by a text, or by an image; or abstracts by an image.

  visbio search "a cell full of orange granules" my_folder
  visbio search --image cell.png my_folder
  visbio search --image cell.png --corpus pubmed.jsonl

What was looked at once is kept in an index, in the folder or beside the corpus."""


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"visbio: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `visbio` with the arguments `argv`, by default those of the process, and return the exit code.

    Raises:
        SystemExit: after --help and --version, and for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _build_parser().parse_args(argv[:1] if argv[:1] in (["evaluate"], ["audit"]) else argv)
    args.flags = argv[1:]
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("\nvisbio: interrupted\n")
        return 130
    except (ValueError, OSError, MemoryError) as error:
        sys.stderr.write(f"visbio: error: {one_line(error)}\n")
        return 1
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visbio", description="Text-to-image diffusion models for biology.")
    parser.add_argument("--version", action="version", version=f"visbio {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="draw images from descriptions, or a labelled set",
        description=GENERATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_generate_arguments(generate)
    generate.set_defaults(run=_generate, error=generate.error)

    redraw_commands.add_commands(commands)

    # Their flags are the fields of a config, as in the scripts.
    evaluate = commands.add_parser("evaluate", help="measure a model, or images, against real images")
    evaluate.set_defaults(run=_evaluate)
    audit = commands.add_parser("audit", help="look for training images among generated ones")
    audit.set_defaults(run=_audit)

    describe = commands.add_parser(
        "describe",
        help="say what images show",
        description=DESCRIBE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_describe_arguments(describe)
    describe.set_defaults(run=_describe, error=describe.error)
    search = commands.add_parser(
        "search",
        help="find images by a text or an image, and abstracts by an image",
        description=SEARCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_search_arguments(search)
    search.set_defaults(run=_search, error=search.error)

    explain_command.add_command(commands)
    demo_command.add_command(commands)

    data = commands.add_parser("data", help="look at image sets; get texts of PubMed")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    data_commands.add_actions(actions)
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="a description of the image")
    add("--num-images", type=positive, help="images of each prompt; default: 8")
    add("--dataset", help="draw the classes of this set instead: a MedMNIST flag, or a YAML caption bank")
    add("--per-class", type=positive, help="images of each class of --dataset")
    add("--format", choices=("imagefolder", "npz", "grid"), default="imagefolder", help="default: %(default)s")
    add("--prompts", choices=("plain", "captions"), default="plain", dest="wording", help="of a set; default: plain")
    add("--output", type=Path, help="PNG, npz or, for an imagefolder, a folder; default for prompts: out.png")
    add("--steps", type=positive, help="denoising steps; default: the pipeline's")
    add("--guidance-scale", type=float, help="weight of the text, 1 is off; default: the pipeline's")
    add("--negative-prompt", help="what to steer away from")
    add("--seed", type=seed_number, default=0, help="of the first image; default: %(default)s")
    add("--height", type=positive, help="in pixels; default: the model's size")
    add("--width", type=positive, help="in pixels; default: the model's size")
    add("--batch-size", type=positive, default=64, help="images drawn together; default: %(default)s")
    add("--model", help="a folder or a Hub id; default: the model that comes with the package")
    add("--lora", help="a LoRA adapter: folder, .safetensors file or Hub id")
    add("--lora-scale", type=float, default=1.0, help="weight of the adapter; default: %(default)s")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 or mps; default: the fastest there is")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")


def _add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    add("--captions", help="what to choose from: a caption bank, or a .txt or .csv file; default: the model's bank")
    add("--subtypes", action="store_true", help="tell the subtypes of a bank apart")
    add("--top", type=positive, default=3, help="captions shown of each image; default: %(default)s")
    add("--explain", type=Path, metavar="PNG", help="of one image: ask the generator too, and show what decided")
    add("--generator", help="the generator that --explain asks; default: the model that comes with the package")
    add("--model", help="dual encoder, a folder or a Hub id; default: the one that comes with the package")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 or mps; default: the fastest there is")


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("places", nargs="*", metavar="QUERY FOLDER", help="a text, unless --image is given; a folder, unless --corpus")
    add("--image", type=Path, help="look for what is like this image")
    add("--corpus", type=Path, help="look in these abstracts: JSON lines with pmid and abstract")
    add("--top", type=positive, default=5, help="results; default: %(default)s")
    add("--index", type=Path, help="file of the index; default: in the folder, or beside the corpus")
    add("--model", help="dual encoder, a folder or a Hub id; default: the one that comes with the package")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 or mps; default: the fastest there is")


def _generate(args: argparse.Namespace) -> None:
    output = _check_generate(args)
    from visbio_diffusers import generate
    from visbio_diffusers.captions import load_bank
    from visbio_diffusers.load import load_pipeline

    labelled = None
    if args.dataset is not None:
        labelled = generate.LabelledSet(load_bank(args.dataset), args.per_class, args.seed, args.wording)
    pipe, provenance = load_pipeline(args.model, args.device, args.dtype, args.lora, args.lora_scale)
    known = provenance.get("caption_banks")
    if labelled is not None and known is not None and labelled.bank.name not in known.split(", "):
        raise ValueError(
            f"the model {provenance['model']} has learned the classes of {known or 'no data set'}, not those of "
            f"{labelled.bank.name}: name another --model"
        )
    studio = generate.open_studio(
        pipe,
        provenance,
        args.batch_size,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    if labelled is None:
        folder = generate.generate_prompts(studio, args.prompts, args.num_images or 8, args.seed, output)
        say(f"single images: {folder}")
    else:
        write = {"grid": generate.generate_grid, "npz": generate.generate_npz, "imagefolder": generate.generate_folder}
        write[args.format](studio, labelled, output)
    say(str(output))


def _check_generate(args: argparse.Namespace) -> Path:
    """Refuse arguments that do not go together, and return the output."""
    if (args.dataset is None) == (not args.prompts):
        args.error("give either prompts or --dataset")
    if args.dataset is None:
        output, suffix = args.output or Path("out.png"), ".png"
        if args.per_class is not None:
            args.error("--per-class is for --dataset; the images of a prompt are counted by --num-images")
    else:
        output, suffix = args.output, {"grid": ".png", "npz": ".npz"}.get(args.format)
        if args.per_class is None or output is None:
            args.error("--dataset needs --per-class and --output")
        if args.num_images is not None:
            args.error("--num-images is for prompts; the images of --dataset are counted by --per-class")
    if suffix is not None and output.suffix.lower() != suffix:
        args.error(f"--output {output} must end in {suffix}")
    return output


def _evaluate(args: argparse.Namespace) -> None:
    from visbio_diffusers.config import parse
    from visbio_diffusers.evaluation.benchmark import EvaluateConfig, evaluate

    config = parse(EvaluateConfig, {}, args.flags, "visbio evaluate")
    evaluate(config)
    say(config.output)


def _audit(args: argparse.Namespace) -> None:
    from visbio_diffusers.config import parse
    from visbio_diffusers.evaluation.audit import AuditConfig, audit

    config = parse(AuditConfig, {}, args.flags, "visbio audit")
    audit(config)
    say(str(Path(config.output, "audit.json")))


def _describe(args: argparse.Namespace) -> None:
    from visbio_diffusers.alignment import command

    for line in command.describe_files(
        args.images, args.model, args.captions, args.subtypes, args.top, args.explain, args.generator, args.device
    ):
        say(line)


def _search(args: argparse.Namespace) -> None:
    if args.corpus and not args.image:
        args.error("--corpus is searched by --image: its sentences are compared with what an image shows")
    wanted = ([] if args.image else ["QUERY"]) + ([] if args.corpus else ["FOLDER"])
    if len(args.places) != len(wanted):
        args.error(f"give {' and '.join(wanted) or 'nothing'} beside the flags, got {len(args.places)} arguments")
    given = dict(zip(wanted, args.places, strict=True))
    from visbio_diffusers.alignment import command

    settings = args.model, args.top, args.index, args.device
    if args.corpus:
        lines = command.search_corpus(args.image, args.corpus, *settings)
    else:
        lines = command.search_folder(args.image or given["QUERY"], Path(given["FOLDER"]), *settings)
    for line in lines:
        say(line)


if __name__ == "__main__":
    sys.exit(main())
