"""The commands `visbio reconstruct`, `visbio edit` and `visbio restore`."""

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

RESTORE_HELP = """\
Draw what an image may have been before it was noised, or reduced to half its size.

  visbio restore noisy.png --task denoise --noise-std 0.1
  visbio restore small.png --task super-resolution

The image is taken for y = A x + n, where x is drawn: a sample of what the model has learned that fits y. A takes the
mean over squares of --factor pixels (1 to denoise), n is Gaussian noise of --noise-std, where white is 1. Other noise,
other optics and other cells than the model's give images that look right and are not. The middle square of the image
is brought to the model's size, over --factor, before; of several samples the file has all, then their mean, and their
standard deviation at each place (white: 0.25 and more), which tells what the image does not say."""


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

    summary = "remove noise, or enlarge an image"
    restore = commands.add_parser("restore", help=summary, description=RESTORE_HELP, formatter_class=raw)
    add = restore.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image file")
    add("--task", choices=("denoise", "super-resolution"), required=True, help="what to do")
    add("--noise-std", type=float, help="default: estimated to denoise, and said; 0 for super-resolution")
    add("--factor", type=positive, default=2, help="of super-resolution; default: %(default)s")
    add("--prompt", default="", help="what it shows; default: the model goes by the image alone")
    add("--num-images", type=positive, default=1, help="samples; default: %(default)s")
    add("--seed", type=seed_number, default=0, help="of the first sample; default: %(default)s")
    add("--output", type=Path, default=Path("restored.png"), help="PNG; default: %(default)s")
    _add_model_arguments(restore, guidance_scale=1.0)
    restore.set_defaults(run=_restore)


def _add_model_arguments(parser: argparse.ArgumentParser, guidance_scale: float = 1.35) -> None:
    add = parser.add_argument
    add("--steps", type=positive, default=25, help="denoising steps; default: %(default)s")
    add(
        "--guidance-scale",
        type=float,
        default=guidance_scale,
        help="weight of the text, 1 is off; default: %(default)s",
    )
    add("--model", help="a folder or a Hub id; default: the model that comes with the package")
    add("--device", help="cpu, cuda, cuda:1 or mps; default: the fastest there is")


def _reconstruct(args: argparse.Namespace) -> None:
    from visbio_diffusers.redrawing import reconstruct

    _draw(args, reconstruct, prompt=args.prompt, strength=args.strength, seed=args.seed)


def _edit(args: argparse.Namespace) -> None:
    from visbio_diffusers.redrawing import edit

    _draw(args, edit, source=args.source, target=args.target)


def _restore(args: argparse.Namespace) -> None:
    from visbio_diffusers.redrawing import restore

    factor = 1 if args.task == "denoise" else args.factor
    noise_std = 0.0 if args.noise_std is None and factor > 1 else args.noise_std
    wanted = {"prompt": args.prompt, "factor": factor, "noise_std": noise_std}
    record = _draw(args, restore, **wanted, num_images=args.num_images, seed=args.seed)
    if noise_std is None:
        say(f"noise estimated at {float(record['noise_std']):.3f} of white")


def _draw(args: argparse.Namespace, function, **wanted) -> dict[str, str]:
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
    return record
