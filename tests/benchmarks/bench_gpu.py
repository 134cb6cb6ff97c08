"""Training and sampling on a GPU beside diffusers' UNet2DConditionModel of as many parameters, in one run.

python tests/benchmarks/bench_gpu.py [--sections matmul train sample profile memory] [--batch_size 512] [--output JSON]
64 px RGB. Both sides are compiled, in bf16, on the same random images and texts; ours is timed before and after the
peer, which shows the spread. Achieved FLOP/s count the model's matrix products and convolutions, without recomputing;
they are shares of what a bf16 product of 8192 x 8192 reaches on the same card. Each figure is printed and written to
--output as soon as it is there; a section that fails says so, and the next one runs.
"""

import argparse
import gc
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visbio_diffusers import VisBioPipeline, VisBioUNet
from visbio_diffusers.losses import diffusion_loss


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_text_to_image.py"
TOKENS, WIDTH, CAP_GB = 48, 192, 4
VARIANTS = {"eager": {"compiled": False}, "contiguous": {"memory_format": torch.contiguous_format}}
OURS = dict(
    sample_size=64, block_out_channels=(64, 128, 384), layers_per_block=2, num_transformer_layers=8, film_dim=256,
)  # fmt: skip
# Channels of powers of two, and a time embedding that makes up for parameters at no cost.
PEER = dict(
    sample_size=64, block_out_channels=(64, 128, 256), layers_per_block=2, time_embedding_dim=512,
    in_channels=3, out_channels=3, attention_head_dim=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
SMALL = {
    "visbio": dict(sample_size=16, block_out_channels=(16, 64), layers_per_block=1, num_transformer_layers=1),
    "diffusers": dict(sample_size=16, block_out_channels=(32, 32, 32), layers_per_block=1, time_embedding_dim=64),
}
OTHER = "elementwise, norms, reductions"
# The kinds of kernels by their names; the first that fits. Those of Triton are named after all that they fuse.
KINDS = {
    OTHER: "^triton_(?!tem)",
    "attention": "flash|fmha|sdpa|attention",
    "layout of convolutions": "nchwToNhwc|nhwcToNchw",
    "convolutions": "fprop|dgrad|wgrad|convol|conv2d|cudnn",
    "matrix products": "gemm|nvjet|cublas|cutlass|splitK|^triton_tem",
    "optimizer, clipping, EMA": "multi_tensor_apply|adam",
    "copies": "^Mem(cpy|set)",
}
MEMORY = """
import json, os, runpy, sys, tempfile, torch
cuda = torch.cuda.is_available()
if cuda:
    torch.cuda.set_per_process_memory_fraction({cap_gb} * 2**30 / torch.cuda.mem_get_info()[1])
folder = tempfile.mkdtemp()
sys.argv = ["train", "--preset", "rtx3050", "--dataset_name", {dataset!r}, "--output_dir", folder]
sys.argv += ["--max_train_steps", "{steps}", "--validation_steps", "0", "--report_to", "none"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
found = {{}}
if cuda:
    found = {{"peak_gb": torch.cuda.max_memory_allocated(), "reserved_gb": torch.cuda.max_memory_reserved()}}
    found["context_gb"] = {free} - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
print("RESULT " + json.dumps(found))
"""


def make_unet(side, small=False):
    """Return the UNet of a side: "visbio" or "diffusers"."""
    unet_class, shape = (VisBioUNet, OURS) if side == "visbio" else (UNet2DConditionModel, PEER)
    return unet_class(cross_attention_dim=WIDTH, **{**shape, **(SMALL[side] if small else {})})


def make_batch(batch_size, size, device):
    """Return random images, texts of 8 to 48 tokens padded with zeros, and the mask of their tokens."""
    pixel_values = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    lengths = torch.randint(8, TOKENS + 1, (batch_size, 1), device=device)
    mask = torch.arange(TOKENS, device=device) < lengths
    return pixel_values, torch.randn(batch_size, TOKENS, WIDTH, device=device) * mask[..., None], mask


def count_flops(unet, device):
    """Return the GFLOP for an image of the forward and of the backward pass, without recomputing."""
    pixel_values, text, mask = make_batch(2, unet.config.sample_size, device)
    timesteps = torch.tensor([10, 500], device=device)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = unet(pixel_values, timesteps, text, encoder_attention_mask=mask, return_dict=False)[0].mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    unet.zero_grad()
    return forward.get_total_flops() / 2e9, backward.get_total_flops() / 2e9


def make_step(unet, scheduler, batch):
    """Return a training step as a function: bf16 forward, backward, clipping, AdamW, and the moving average."""
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ema = EMAModel(parameters, decay=0.999, foreach=True)

    def step():
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            loss = diffusion_loss(unet, scheduler, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)

    return step


def seconds_per_call(function, calls, cuda):
    """Return the mean seconds of `calls` calls in a row: on a GPU by its own clock."""
    if not cuda:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def trace(function, cuda):
    """Run a function under the profiler and return the events of its trace, times in microseconds."""
    with torch.profiler.profile() as profiler:
        function()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def kind_of(name):
    """Return the kind of a kernel by its name."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name)), OTHER)


def summarize(events, steps):
    """Return what share of the kernels' time each kind took, the top 12 kernels, and how busy the GPU was."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:  # on a CPU
        return {}
    total = sum(kernel["dur"] for kernel in kernels)
    kinds, names = Counter(), Counter()
    for kernel in kernels:
        kinds[kind_of(kernel["name"])] += kernel["dur"]
        names[kernel["name"]] += kernel["dur"]
    span = max(kernel["ts"] + kernel["dur"] for kernel in kernels) - min(kernel["ts"] for kernel in kernels)
    return {
        "kernel_ms_per_step": total / 1000 / steps,
        "kernels_per_step": len(kernels) / steps,
        "busy": total / span,
        "share": {kind: us / total for kind, us in kinds.most_common()},
        "top": [[name[:100], us / 1000 / steps, us / total] for name, us in names.most_common(12)],
    }


class Bench:
    """The sections, and what they have found so far."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.scheduler = runpy.run_path(str(SCRIPT))["make_scheduler"]("v_prediction")
        self.started, self.step = time.perf_counter(), None  # the compiled training step of ours
        device = torch.cuda.get_device_name() if self.cuda else args.device
        self.results = {**vars(args), "device": device, "torch": torch.__version__, "errors": {}}

    def add(self, section, name, values):
        """Print figures, and write all there are so far."""
        self.results.setdefault(section, {})[name] = values
        sys.stdout.write(f"[{time.perf_counter() - self.started:.0f} s] {section}, {name}: {json.dumps(values)}\n")
        sys.stdout.flush()
        if self.args.output:
            Path(self.args.output).write_text(json.dumps(self.results, indent=1) + "\n")

    def run(self):
        """Run the sections; one that fails is noted, and does not end the run."""
        for section in self.args.sections:
            try:
                getattr(self, section)()
            except Exception as error:
                traceback.print_exc()
                self.add("errors", section, f"{type(error).__name__}: {error}"[:500])
        self.add("compiled", "graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
        self.add("compiled", "graph breaks", sum(torch._dynamo.utils.counters["graph_break"].values()))

    def allocated(self, peak=False):
        """Return the GB of the GPU that tensors take, or took at most."""
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read() / 2**30 if self.cuda else 0.0

    def tidy(self):
        """Give back the memory of what is no longer used, and begin to watch the peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def times(self, function, blocks, calls):
        return [seconds_per_call(function, calls, self.cuda) for _ in range(blocks)]

    def matmul(self):
        """Measure the rate of a large bf16 product, and of a copy."""
        side = 256 if self.args.small else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.times(lambda: a @ b, 1, 3)
        seconds = statistics.median(self.times(lambda: a @ b, 9, 10))
        self.add("matmul", "tflops", 2 * side**3 / seconds / 1e12)
        source = torch.rand(64 * side * side // 4, device=self.device)  # 4 GiB
        target = torch.empty_like(source)
        self.times(lambda: target.copy_(source), 1, 3)
        seconds = statistics.median(self.times(lambda: target.copy_(source), 9, 5))
        self.add("matmul", "copy_tb_per_second", 2 * source.numel() * source.element_size() / seconds / 1e12)

    def train(self):
        """Measure training: ours, the peer, ours again, and the variants of ours."""
        self.step = self.training_row("visbio", "visbio", self.args.batch_size)
        for batch_size in (self.args.batch_size, self.args.batch_size // 2):
            with suppress(torch.OutOfMemoryError):
                self.training_row("diffusers", "diffusers", batch_size)
                break
        self.tidy()
        self.step()
        self.add("train", "visbio again", self.rates(self.step, self.args.batch_size))
        for variant in self.args.variants:
            self.training_row(f"visbio {variant}", "visbio", self.args.batch_size, **VARIANTS[variant])
        ours, peer = (self.results["train"][side]["images_per_second"] for side in ("visbio", "diffusers"))
        self.add("train", "times as fast", ours / peer)

    def training_row(self, name, side, batch_size, compiled=True, memory_format=torch.channels_last):
        """Measure one side, and return its training step."""
        self.tidy()
        before = self.allocated()
        unet = make_unet(side, self.args.small).to(self.device)
        forward, backward = count_flops(unet, self.device)
        unet.to(memory_format=memory_format).train()
        if compiled and self.args.compile:
            unet.compile(dynamic=False)
        step = make_step(unet, self.scheduler, make_batch(batch_size, unet.config.sample_size, self.device))
        seconds = seconds_per_call(step, 1, self.cuda)
        self.tidy()
        for _ in range(4):
            step()
        row = {"parameters": unet.num_parameters(), "gflop_forward": forward, "gflop_backward": backward}
        row |= {"first_step_s": seconds, **self.rates(step, batch_size)}
        row["peak_gb"] = self.allocated(peak=True) - before
        row["tflops"] = row["images_per_second"] * (forward + backward) / 1000
        if "matmul" in self.results:
            row["share_of_matmul"] = row["tflops"] / self.results["matmul"]["tflops"]
        self.add("train", name, row)
        return step

    def rates(self, function, batch_size, blocks=None, calls=None):
        """Return images/s: the median of the blocks of calls, the slowest and the fastest."""
        seconds = self.times(function, blocks or self.args.blocks, calls or self.args.steps_per_block)
        rates = {"images_per_second": statistics.median(seconds), "slowest": max(seconds), "fastest": min(seconds)}
        return {"batch_size": batch_size, **{name: batch_size / each for name, each in rates.items()}}

    def sample(self):
        """Measure guided sampling in bf16: both with a few steps, and the peer with DDIM as is usual."""
        config, steps = self.scheduler.config, self.args.steps
        solver = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
        few = f"DPM-Solver++ {steps}"
        self.sampling_rows("visbio", {few: (solver, steps)})
        many = DDIMScheduler.from_config(config), self.args.ddim_steps
        self.sampling_rows("diffusers", {few: (solver, steps), f"DDIM {self.args.ddim_steps}": many})
        rates = {name: row["images_per_second"] for name, row in self.results["sample"].items()}
        ours = rates.pop(f"visbio {few}")
        for name, rate in rates.items():
            self.add("sample", f"times as fast as {name}", ours / rate)

    def sampling_rows(self, side, samplers):
        """Measure one side with each of some schedulers and numbers of steps."""
        self.tidy()
        batch_size, before = self.args.sample_batch_size, self.allocated()
        unet = make_unet(side, self.args.small).eval()
        unet.to(self.device, torch.bfloat16, memory_format=torch.channels_last)
        if self.args.compile:
            unet.compile(dynamic=False)
        text = make_batch(batch_size, unet.config.sample_size, self.device)[1]
        negative = text * (torch.arange(TOKENS, device=self.device) < 2)[:, None]
        for name, (scheduler, steps) in samplers.items():
            pipe = VisBioPipeline(unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None)
            pipe.set_progress_bar_config(disable=True)

            def draw(steps=steps, pipe=pipe):
                texts = {"prompt_embeds": text, "negative_prompt_embeds": negative}
                return pipe(None, num_inference_steps=steps, guidance_scale=2.0, output_type="pt", **texts)

            seconds = seconds_per_call(lambda draw=draw: draw(3), 1, self.cuda)
            self.tidy()
            draw(3)
            row = {"first_call_s": seconds, **self.rates(draw, batch_size, blocks=3, calls=1)}
            row["peak_gb"] = self.allocated(peak=True) - before
            events = trace(draw, self.cuda)
            counts = Counter(event["name"] for event in events if event.get("cat") in ("cuda_runtime", "gpu_memcpy"))
            row["waits_per_step"] = counts["cudaStreamSynchronize"] / steps
            row["copies_to_host_per_step"] = sum(counts[n] for n in counts if n.startswith("Memcpy DtoH")) / steps
            row |= {key: value for key, value in summarize(events, steps).items() if key != "top"}
            self.add("sample", f"{side} {name}", row)

    def profile(self):
        """Show where the time of a compiled training step of ours goes."""
        self.step = self.step or self.training_row("visbio", "visbio", self.args.batch_size)
        self.step()
        events = trace(lambda: [self.step() for _ in range(3)], self.cuda)
        for name, value in summarize(events, 3).items():
            self.add("profile", name, value)

    def memory(self):
        """Train with the preset for a card of 4 GB, in a process that may take no more."""
        with tempfile.TemporaryDirectory() as folder:
            dataset = Path(self.args.dataset or Path(folder, "bloodmnist_random.npz")).resolve()
            if not self.args.dataset:
                images = np.random.default_rng(0).integers(0, 256, (640, 28, 28, 3), dtype=np.uint8)
                labels = np.arange(640, dtype=np.uint8)[:, None] % 8
                np.savez(dataset, train_images=images, train_labels=labels)
            steps = 2 if self.args.small else 20
            free = torch.cuda.mem_get_info()[0] if self.cuda else 0
            code = MEMORY.format(cap_gb=CAP_GB, dataset=str(dataset), steps=steps, free=free, script=str(SCRIPT))
            options = {"cwd": ROOT, "env": {**os.environ, "TMPDIR": folder, "HF_HUB_OFFLINE": "1"}}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
        if done.returncode:
            raise RuntimeError(f"the preset rtx3050 ended with: {done.stderr.strip()[-400:]}")
        found = {name: size / 2**30 for name, size in json.loads(done.stdout.rpartition("RESULT ")[2]).items()}
        self.add("memory", "rtx3050", {"cap_gb": CAP_GB, "steps": steps, **found})

    def table(self):
        """Return the figures as Markdown."""
        found = self.results
        keys = "batch_size", "images_per_second", "slowest", "fastest", "tflops", "share_of_matmul", "peak_gb"
        keys += "busy", "waits_per_step"
        lines = [f"{found['device']}, torch {found['torch']}", "", f"| | {' | '.join(keys)} |", "|---" * 10 + "|"]
        for part in ("train", "sample"):
            for name, row in found.get(part, {}).items():
                row = row if isinstance(row, dict) else {"images_per_second": row}
                cells = (f"{row[key]:.4g}" if key in row else "" for key in keys)
                lines.append(f"| {part}: {name} | {' | '.join(cells)} |")
        for part in ("matmul", "profile", "memory", "compiled", "errors"):
            lines += [f"\n{part}, {name}: {value}" for name, value in found.get(part, {}).items()]
        return "\n".join(lines) + "\n"


def main(argv=None):
    """Measure, print a table, and write all figures to --output."""
    sections = ["matmul", "train", "sample", "profile", "memory"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["eager"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of training steps that are timed")
    parser.add_argument("--steps_per_block", type=int, default=10)
    parser.add_argument("--sample_batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of DPM-Solver++")
    parser.add_argument("--ddim_steps", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cudnn_benchmark", action="store_true", help="have cuDNN try its algorithms")
    parser.add_argument("--dataset", help="npz that it trains on; default: random images")
    parser.add_argument("--small", action="store_true", help="tiny models, to try this script")
    parser.add_argument("--output", help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch._dynamo.config.recompile_limit = 64  # one function calls all the UNets
    torch.manual_seed(0)
    bench = Bench(args)
    bench.run()
    sys.stdout.write("\n" + bench.table())
    return bench.results


if __name__ == "__main__":
    sys.exit(1 if main()["errors"] else 0)
