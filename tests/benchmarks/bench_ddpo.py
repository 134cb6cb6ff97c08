"""Reward fine-tuning beside TRL's last DDPO trainer, on visbio-blood-28: speed of the same math, and time to a reward.

pip install --no-deps trl==0.23.1 and python tests/benchmarks/bench_ddpo.py [--repeats 2] [--epochs 4] [--output JSON]
Each side runs in a process of its own, in turn, so that its peak memory is its own: trl, the same math here (gradients
through the empty text too), and fast (DRaFT through the last step). To TRL the UNet is given behind an identity VAE.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch


ROOT = Path(__file__).parents[2]
PROMPTS = ["a microscopy image of a monocyte", "a microscopy image of a basophil", "an eosinophil, Giemsa stain"]
COMMON = {"rank": 4, "guidance_scale": 2.0, "sample_steps": 20, "learning_rate": 1e-3}
SCHEDULE = {"rescale_betas_zero_snr": False}  # with it TRL's first step is the root of a number just below 0


class IdentityVAE(torch.nn.Module):
    """A VAE whose latents are the pixels."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=[1])
    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents, return_dict=True):
        """Return the latents."""
        return (latents,)


def make_trl(images, updates):
    """Return TRL's trainer of the shipped pipeline; `images` in an epoch, `updates` of the optimizer."""
    from accelerate import PartialState
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
    from trl.trainer.ddpo_config import DDPOConfig
    from trl.trainer.ddpo_trainer import DDPOTrainer

    from visbio_diffusers.load import load_pipeline

    PartialState()  # TRL logs before it makes its Accelerator
    pipe, _ = load_pipeline(None, "cpu")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **SCHEDULE)
    inner = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    super(StableDiffusionPipeline, inner).__init__()
    inner.register_modules(
        vae=IdentityVAE(), text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, image_encoder=None,
    )  # fmt: skip
    inner.check_inputs = lambda *args, **kwargs: None  # which refuses sizes that are no multiple of 8
    inner.vae_scale_factor, inner.image_processor = 1, pipe.image_processor
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    outer = DefaultDDPOStableDiffusionPipeline.__new__(DefaultDDPOStableDiffusionPipeline)
    outer.sd_pipeline, outer.use_lora = inner, True
    config = DDPOConfig(
        sample_num_steps=COMMON["sample_steps"], sample_guidance_scale=COMMON["guidance_scale"],
        train_learning_rate=COMMON["learning_rate"], sample_batch_size=images, sample_num_batches_per_epoch=1,
        train_batch_size=images // updates, train_gradient_accumulation_steps=1, mixed_precision="no",
        tracker_project_name="bench", save_freq=10**9, seed=0,
    )  # fmt: skip
    choices = itertools.cycle(PROMPTS)
    reward = lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)), {})  # noqa: E731
    return DDPOTrainer(config, reward, lambda: (next(choices), {}), outer)


def timed(function, seconds):
    """Return a function that adds the time of each call to a list."""

    def wrapped(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    return wrapped


def run_trl(args):
    """Return seconds of rollout and training of each epoch of TRL, its rewards, and the tuned UNet."""
    trainer = make_trl(args.images, args.updates)
    rollout, training, rewards = [], [], []
    trainer._generate_samples = timed(trainer._generate_samples, rollout)
    trainer._train_batched_samples = timed(trainer._train_batched_samples, training)
    scored = trainer.compute_rewards

    def note(*a, **k):
        found, metadata = scored(*a, **k)
        rewards.append(torch.cat(list(found)).mean().item())
        return [*found], metadata

    trainer.compute_rewards = note
    for epoch in range(args.epochs):
        trainer.step(epoch, 0)
    steps = args.images * COMMON["sample_steps"]
    return rollout, training, rewards, steps, trainer.sd_pipeline.unet


def run_own(args, **flags):
    """Return the same of our trainer."""
    import runpy

    from visbio_diffusers.reward_tuning import round_loss
    from visbio_diffusers.rollouts import decoder, make_policy
    from visbio_diffusers.rounds import Rounds
    from visbio_diffusers.training import _optimizer_step, make_accelerator, make_optimizer, trainable

    script = runpy.run_path(str(ROOT / "train_scripts" / "train_ddpo_lora.py"))
    folder = tempfile.mkdtemp()
    prompts = Path(folder, "prompts.txt")
    prompts.write_text("\n".join(PROMPTS))
    draft = flags.get("objective") == "draft"
    kept = 1 if draft else COMMON["sample_steps"] - 1
    samples = args.images // args.updates * kept  # of an optimizer step
    size = max(number for number in range(1, 41) if samples % number == 0)  # steps of all images share a batch
    common = dict(
        output_dir=folder, prompts=str(prompts), reward="brightness", num_prompts_per_round=4, report_to="none",
        num_images_per_prompt=args.images // 4, train_batch_size=size, lora_alpha=4,
        gradient_accumulation_steps=samples // size, train_timestep_fraction=1.0, num_rounds=args.epochs,
        rollout_batch_size=args.images, **COMMON,
    )  # fmt: skip
    config = script["DDPOConfig"](**{**common, **flags})
    accelerator = make_accelerator(config)
    pipe, _ = script["load_base"](config)
    unet = script["add_adapter"](pipe, config)
    pipe.scheduler.register_to_config(**SCHEDULE)
    policy = make_policy(pipe.scheduler, config.sample_steps, config.guidance_scale, config.eta, "mean")
    policy = policy._replace(train_empty=config.train_empty_text)
    reward, found = script["find_reward"]("brightness"), script["load_prompts"](str(prompts))
    rounds = Rounds(accelerator, config, pipe, policy, reward, None, found)
    model, optimizer = accelerator.prepare(unet, make_optimizer(trainable(unet), config))
    loss_fn = round_loss(accelerator, config, policy, decoder(pipe), reward)
    rollout, training, rewards = [], [], []
    for number in range(config.num_rounds):
        started = time.perf_counter()
        batches = rounds._round(number)
        first = next(batches)
        rollout.append(time.perf_counter() - started)
        batches, started, scores = itertools.chain([first], batches), time.perf_counter(), []
        for step in range(rounds.round_steps):
            metrics = _optimizer_step(accelerator, model, optimizer, batches, loss_fn, config, step)
            scores.append(float(metrics.get("reward", 0)))
        training.append(time.perf_counter() - started)
        rewards.append(rounds.rows[-1].get("reward", statistics.mean(scores)))
        if args.until and rewards[-1] >= args.until:
            break
    return rollout, training, rewards, args.images * kept, unet


def divergence(unet):
    """Return how far whole trajectories of a tuned UNet are from those of its base, in nats, and its reward."""
    from visbio_diffusers.load import load_pipeline
    from visbio_diffusers.reward_tuning import base_model
    from visbio_diffusers.rollouts import collect, encode_prompts, make_policy

    pipe, _ = load_pipeline(None, "cpu")
    pipe.scheduler.register_to_config(**SCHEDULE)
    policy = make_policy(pipe.scheduler, COMMON["sample_steps"], COMMON["guidance_scale"], 1.0, "mean")
    text, kept = encode_prompts(pipe, PROMPTS * 8), policy.stochastic.tolist()
    unet.eval()
    rollout, found = collect(unet, policy, text, torch.Generator().manual_seed(1), kept[::4]), []
    for timestep, sample in zip(kept[::4], rollout.before):
        with torch.no_grad():
            own = policy.step(unet, sample, torch.full((24,), timestep), text)
            with base_model(unet):
                found.append(own.kl(policy.step(unet, sample, torch.full((24,), timestep), text)).mean().item())
    return {"kl": statistics.mean(found) * len(kept), "reward": (rollout.samples.clamp(-1, 1).mean().item() + 1) / 2}


SIDES = {
    "trl": run_trl,
    "same math": lambda args: run_own(args, train_empty_text=True),
    "default": run_own,
    "fast": lambda args: run_own(args, objective="draft", learning_rate=args.fast_learning_rate),
}


def run_side(args):
    """Run one side in this process, and print what was found as JSON."""
    torch.set_num_threads(args.threads)
    rollout, training, rewards, steps, unet = SIDES[args.side](args)
    import resource

    found = {
        "rollout_images_per_second": args.images / statistics.median(rollout),
        "training_steps_per_second": steps / statistics.median(training),
        "seconds": sum(rollout) + sum(training),
        "rewards": rewards,
        "after": divergence(unet),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    sys.stdout.write(f"\nRESULT {json.dumps(found)}\n")


def in_turn(args, side, **more):
    """Run a side in a process of its own, and return what it found."""
    flags = {**{k: getattr(args, k) for k in ("images", "updates", "epochs", "threads", "fast_learning_rate")}, **more}
    command = [sys.executable, __file__, "--side", side, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.split("RESULT ")[1])


def main():
    """Measure, print, and write to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32, help="images of an epoch")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of an epoch")
    parser.add_argument("--repeats", type=int, default=2, help="turns of the comparison of speed, one epoch each")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of TRL in the comparison of time to a reward")
    parser.add_argument("--fast_learning_rate", type=float, default=1e-3)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this JSON file too")
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    turns = {side: [] for side in ("trl", "same math", "default")}
    for _ in range(args.repeats):
        for side, found in turns.items():
            found.append(in_turn(args, side, epochs=1))
    keys = ("rollout_images_per_second", "training_steps_per_second", "peak_memory_gb")
    speed = {
        side: {key: statistics.median(each[key] for each in found) for key in keys} for side, found in turns.items()
    }
    for side in ("same math", "default"):
        speed[f"{side} over trl"] = {key: speed[side][key] / speed["trl"][key] for key in keys}
    peer = in_turn(args, "trl")
    fast = in_turn(args, "fast", epochs=100, until=peer["after"]["reward"])
    results = {
        "torch": torch.__version__, **vars(args), **COMMON, "speed": speed, "trl": peer, "fast": fast,
        "times_as_fast_to_the_reward": peer["seconds"] / fast["seconds"],
    }  # fmt: skip
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
