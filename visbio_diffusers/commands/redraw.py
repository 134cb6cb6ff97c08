"""The commands `visbio reconstruct` and `visbio edit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from visbio_diffusers.commands.arguments import positive, say, seed_number


RECONSTRUCT_HELP = """\
Draw an image again from a noised copy of it, as far from it as --strength says.

  visbio reconstruct cell.png --strength 0.4
  visbio reconstruct cell.png --strength 0.7 --prompt "an eosinophil"

Images are PNG, JPEG, TIFF and others, of any size; the middle square is drawn, at the model's size."""

EDIT_HELP = """\
Draw an image that shows one thing so that it shows another: the noise that gives it with the first text is drawn with
the second.

  visbio edit cell.png "a monocyte" "an eosinophil"

The file has the image, the image drawn again with the first text, which tells how far to trust the edit, and the edit,
from left to right."""


def add_commands(commands) -> None:
    """Add the commands to the subparsers of `visbio`."""
    raw = argparse.RawDescriptionHelpFormatter
    summary = "draw an image again, near or far from it"
    reconstruct = commands.add_parser("reconstruct", help=summary, description=RECONSTRUCT_HELP, formatter_class=raw)
    add = reconstruct.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image file")
    add("--strength", type=float, default=0.4, help="0 keeps the image, 1 ignores it; default: %(default)s")
    add("--prompt", default="", help="what to draw; default: what the model draws without text")
    add("--seed", type=seed_number, default=0, help="of the noise; default: %(default)s")
    add("--output", type=Path, default=Path("reconstructed.png"), help="PNG; default: %(default)s")
    _add_model_arguments(reconstruct)
    reconstruct.set_defaults(run=_reconstruct)

    edit = commands.add_parser(
        "edit", help="change what an image shows by text", description=EDIT_HELP, formatter_class=raw
    )
    add = edit.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image file")
    add("source", metavar="FROM", help="what it shows")
    add("target", metavar="TO", help="what it is to show")
    add("--output", type=Path, default=Path("edited.png"), help="PNG; default: %(default)s")
    _add_model_arguments(edit)
    edit.set_defaults(run=_edit)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=positive, default=25, help="denoising steps; default: %(default)s")
    add("--guidance-scale", type=float, default=1.35, help="weight of the text, 1 is off; default: %(default)s")
    add("--model", help="a folder or a Hub id; default: the model that comes with the package")
    add("--device", help="cpu, cuda, cuda:1 or mps; default: the fastest there is")


def _reconstruct(args: argparse.Namespace) -> None:
    from visbio_diffusers.redrawing import reconstruct

    _draw(args, reconstruct, prompt=args.prompt, strength=args.strength, seed=args.seed)


def _edit(args: argparse.Namespace) -> None:
    from visbio_diffusers.redrawing import edit

    _draw(args, edit, source=args.source, target=args.target)


def _draw(args: argparse.Namespace, function, **wanted) -> None:
    from visbio_diffusers.data.photograph import read_photograph
    from visbio_diffusers.files import digest
    from visbio_diffusers.grid import save_png
    from visbio_diffusers.load import load_pipeline

    picture = read_photograph(args.image)
    pipe, facts = load_pipeline(args.model, args.device)
    facts["image_sha256"] = digest(args.image)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    drawn, record = function(pipe, facts, picture, **wanted, **call)
    save_png(drawn, args.output, record)
    say(str(args.output))
