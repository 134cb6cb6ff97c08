"""A training step of an adapter beside one of all weights: seconds, and bytes of the optimizer's state, in one run.

python tests/benchmarks/bench_lora.py [--threads N] [--device cpu|cuda] [--batch_size 64] [--repeats 9] [--output JSON]
Each side: forward, backward, clipping, AdamW and the moving average of visbio-blood-28; the sides take turns.
"""

import argparse
import json
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel

from visbio_diffusers.config import parse
from visbio_diffusers.load import load_pipeline
from visbio_diffusers.losses import diffusion_loss
from visbio_diffusers.training import make_optimizer, trainable


ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image_lora.py"))
SIDES = {"full": None, "lora attention": [], "lora preset domain": ["--preset", "domain"]}


def make_side(flags, device, batch_size):
    """Return a training step as a function, and its optimizer; `flags` are those of the script, None is full."""
    pipe, _ = load_pipeline(None, str(device))
    argv = [*(flags or []), "--dataset_name", "bloodmnist", "--output_dir", "unused"]
    config = parse(SCRIPT["LoraTrainConfig"], SCRIPT["PRESETS"], argv)
    unet = pipe.unet.float() if flags is None else SCRIPT["add_adapter"](pipe, config)
    unet.train()
    parameters = trainable(unet)
    optimizer, ema = make_optimizer(parameters, config), EMAModel(parameters, foreach=True)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pixel_values = torch.randn(batch_size, 3, 28, 28, device=device)
    text = torch.randn(batch_size, 24, unet.config.cross_attention_dim, device=device)
    mask = torch.ones(batch_size, 24, dtype=torch.bool, device=device)

    def step():
        diffusion_loss(unet, scheduler, pixel_values, text, mask).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, optimizer


def state_bytes(optimizer):
    """Return the bytes that an optimizer keeps for its parameters."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def main():
    """Measure, print, and write to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="write the figures to this JSON file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides = {name: make_side(flags, torch.device(args.device), args.batch_size) for name, flags in SIDES.items()}
    seconds = {name: [] for name in sides}
    for _ in range(args.repeats + 1):
        for name, (step, _) in sides.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first is a warm-up
    state = {name: state_bytes(optimizer) for name, (_, optimizer) in sides.items()}
    results = {
        "torch": torch.__version__,
        **vars(args),
        "seconds_per_step": medians,
        "times_as_fast": {name: medians["full"] / each for name, each in medians.items()},
        "optimizer_bytes": state,
        "optimizer_share": {name: each / state["full"] for name, each in state.items()},
    }
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
