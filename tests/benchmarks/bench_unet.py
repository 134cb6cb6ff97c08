"""Speed and memory of VisBioUNet beside diffusers' UNet2DConditionModel of as many parameters, in one run.

python tests/benchmarks/bench_unet.py [--threads N] [--device cpu|cuda] [--dtype fp32|bf16] [--compile] [--output JSON]
Both sides: same batch, dtype and threads, a warm-up, then the median of 5. Times are of this machine; read the ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from visbio_diffusers import VisBioUNet
from visbio_diffusers.text import text_mask


ROOT = Path(__file__).parents[2]
SIZE, TOKENS, WIDTH = 32, 32, 192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def visbio_unet():
    """Return the UNet of visbio-blood-28 at 32 px."""
    return VisBioUNet(sample_size=SIZE, layers_per_block=1, num_transformer_layers=5, cross_attention_dim=WIDTH)


def stock_unet():
    """Return diffusers' UNet with cross-attention at the two lower resolutions and as many parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(96, 96, 96),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )


def median_seconds(function, device, *others, repeats=5):
    """Return the median wall-clock seconds of `function` after two warm-up calls.

    With `others`, a list for all of them, called in turn so that a busy moment of the machine meets each alike.
    """
    functions = (function, *others)
    seconds = [[] for _ in functions]
    for _ in range(repeats + 2):
        for each, times in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            each()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    medians = [statistics.median(times[2:]) for times in seconds]
    return medians if others else medians[0]


def throughput(unet, device, dtype, batch_size, compiled):
    """Return training and inference images/s of one UNet."""
    unet.to(device)
    if compiled:
        unet.compile()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    sample = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
    timesteps = torch.randint(0, 1000, (batch_size,), device=device)
    text = torch.randn(batch_size, TOKENS, WIDTH, device=device)
    mask = torch.ones(batch_size, TOKENS, dtype=torch.bool, device=device)

    def forward():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return unet(sample, timesteps, text, encoder_attention_mask=mask, return_dict=False)[0]

    def train():
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    unet.train()
    train_seconds = median_seconds(train, device)
    unet.eval()
    with torch.no_grad():
        inference_seconds = median_seconds(forward, device)
    return {"train": batch_size / train_seconds, "inference": batch_size / inference_seconds}


@torch.no_grad()
def guided_sampling(unet, device, batch_size=8, steps=10):
    """Return seconds of a guided DDIM loop without and with cached keys and values of the text."""
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(steps, device=device)
    text = torch.randn(2 * batch_size, TOKENS, WIDTH, device=device)
    mask = text_mask(text)

    def loop(cached):
        latents = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
        cache = {}
        for t in scheduler.timesteps:
            noise_pred = unet(
                torch.cat([latents] * 2), t, text, mask, text_cache=cache if cached else None, return_dict=False
            )[0]
            noise_pred = torch.lerp(*noise_pred.chunk(2), 2.0)
            latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]

    return median_seconds(lambda: loop(False), device, lambda: loop(True))


def peak_memory(code):
    """Run Python `code` in a new process and return its peak resident memory in GB."""
    report = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", code + report]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**20


GENERATE = """
import tempfile
from visbio_diffusers.cli import main
folder = tempfile.mkdtemp()
main(["generate", "a microscopy image of a monocyte", "--num-images", "8", "--output", folder + "/out.png"])
"""
TRAIN = """
import runpy, sys, tempfile
folder = tempfile.mkdtemp()
sys.argv = ["train", "--preset", "blood-28", "--dataset_name", {dataset!r}, "--output_dir", folder]
sys.argv += ["--max_train_steps", "3", "--validation_steps", "0", "--report_to", "none"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""


def main():
    """Measure, print a table, and write it to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", help="write the figures to this JSON file too")
    data = Path(os.environ.get("VISBIO_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--dataset", default=str(data / "medmnist" / "bloodmnist_rebuilt_28.npz"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]

    # First, while this process is small: a new one starts with the peak of the one that it came from.
    train = TRAIN.format(dataset=args.dataset, script=str(ROOT / "train_scripts" / "train_text_to_image.py"))
    peak_gb = {"generate_8": peak_memory(GENERATE), "train_batch_64": peak_memory(train)}

    ours, stock = visbio_unet(), stock_unet()
    results = {"machine": platform.processor(), "torch": torch.__version__, **vars(args)}
    results["peak_gb"] = peak_gb
    results["parameters"] = {"visbio": ours.num_parameters(), "stock": stock.num_parameters()}
    results["images_per_second"] = {
        name: throughput(unet, device, dtype, args.batch_size, args.compile)
        for name, unet in (("stock", stock), ("visbio", ours))
    }
    rates = results["images_per_second"]
    results["ratio"] = {kind: rates["visbio"][kind] / rates["stock"][kind] for kind in ("train", "inference")}
    plain, cached = guided_sampling(ours.eval(), device)
    results["ratio"]["cached_text"] = plain / cached
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
