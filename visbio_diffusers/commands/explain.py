"""The command `visbio explain`: one HTML file on what a model drew, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from visbio_diffusers.commands.arguments import device_name, positive, say, seed_number


# What the command needs beyond argparse is imported in its function, so that help and usage errors do not wait for it.

HELP = """\
Draw a prompt and show why the images look as they do, as one HTML file that opens anywhere; or, with --image, show
where the words of the prompt are in an image of yours.

  visbio explain "an eosinophil, Wright-Giemsa stain" --output report.html
  visbio explain "an eosinophil" --instead "a basophil" --output report.html
  visbio explain "an eosinophil" --image cell.png --output report.html

The file shows where each word was read, what the model sees in noise, what the seed decides, and, with --instead, what
other words change. Image k has the seed --seed + k, as in visbio generate."""


def add_command(commands) -> None:
    """Add the command to the subparsers of `visbio`."""
    parser = commands.add_parser(
        "explain",
        help="show why drawn images look as they do",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="a description of the image")
    add("--output", type=Path, required=True, help="the report, .html")
    add("--image", type=Path, metavar="FILE", help="explain the middle square of this image instead of drawing any")
    add("--instead", metavar="PROMPT", help="draw the same seeds from this prompt too, best with one word changed")
    add("--seed", type=seed_number, default=0, help="of the first image; default: %(default)s")
    add("--num-seeds", type=positive, default=8, help="images, at least 2; default: %(default)s")
    add("--steps", type=positive, help="denoising steps; default: the pipeline's")
    add("--guidance-scale", type=float, help="weight of the text, 1 is off; default: the pipeline's")
    add("--model", help="a folder or a Hub id; default: the model that comes with the package")
    add("--lora", help="a LoRA adapter: folder, .safetensors file or Hub id")
    add("--lora-scale", type=float, default=1.0, help="weight of the adapter; default: %(default)s")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 or mps; default: the fastest there is")
    parser.set_defaults(run=_explain, error=parser.error)


def _explain(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() not in (".html", ".htm"):
        args.error(f"--output {args.output} must end in .html")
    if args.num_seeds < 2:
        args.error("--num-seeds must be at least 2: what the seed decides is seen from several")
    if args.image and args.instead is not None:
        args.error("--instead compares drawn images, and --image draws none: give one of the two")
    from visbio_diffusers.data.photograph import read_photograph
    from visbio_diffusers.explanation.report import write_image_report, write_report
    from visbio_diffusers.load import load_pipeline

    given = read_photograph(args.image) if args.image else None
    pipe, provenance = load_pipeline(args.model, args.device, lora=args.lora, lora_scale=args.lora_scale)
    chosen = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    if given:
        name = args.image.name
        write_image_report(pipe, provenance, args.prompt, given, name, args.seed, args.output, **chosen)
    else:
        seeds = range(args.seed, args.seed + args.num_seeds)
        write_report(pipe, provenance, args.prompt, seeds, args.output, args.instead, **chosen)
    say(str(args.output))
