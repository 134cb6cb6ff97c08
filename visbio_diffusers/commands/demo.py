"""The command `visbio demo`: a page in the browser to try a model on."""

from __future__ import annotations

import argparse
from pathlib import Path

from visbio_diffusers.commands.arguments import device_name, say


# What the command needs beyond argparse is imported in its function, so that help and usage errors do not wait for it.

HELP = """\
Serve a page to try a model on: draw, describe, draw again, edit, and say which of two images is better.

  visbio demo
  visbio demo --model runs/my-model/pipeline --lora runs/my-adapter/lora --reference my_images --votes my-votes
  visbio demo --write-space my-space

The page is for this machine alone, unless --host says otherwise, and needs no network. Votes are pairs as
train_reward.py and train_dpo_lora.py take them. --write-space writes a folder to upload as a Hugging Face Space."""


def add_command(commands) -> None:
    """Add the command to the subparsers of `visbio`."""
    parser = commands.add_parser(
        "demo",
        help="try a model in the browser",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="a folder or a Hub id; default: the model that comes with the package")
    add("--lora", nargs="+", default=[], help="LoRA adapters to choose from: folders, .safetensors files or Hub ids")
    add("--reference", default="", metavar="DATASET", help="show real images of this set beside drawn ones")
    add("--votes", type=Path, default=Path("votes"), help="folder for preferences; default: %(default)s")
    add("--host", default="127.0.0.1", help="0.0.0.0 is for all who can reach this machine; default: %(default)s")
    add("--port", type=_port, default=7860, help="default: %(default)s")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 or mps; default: the fastest there is")
    add("--write-space", type=Path, metavar="FOLDER", help="write a Space instead, into a new folder")
    parser.set_defaults(run=_demo)


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} must be from 1 to 65535")
    return value


def _demo(args: argparse.Namespace) -> None:
    if args.write_space:
        from visbio_diffusers.demo.space import write_space

        write_space(args.write_space, args.model, args.lora)
        say(str(args.write_space))
        return
    from visbio_diffusers.demo.models import Models
    from visbio_diffusers.demo.server import serve

    models = Models(args.model, args.lora, args.device, args.reference)
    serve(models, args.votes, args.host, args.port, lambda address: say(f"{address} (end: Ctrl-C)"))
