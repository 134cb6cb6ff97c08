"""Fine-tune a text-to-image pipeline to a reward, by reinforcement learning on a LoRA adapter (DDPO and others).

accelerate launch train_scripts/train_ddpo_lora.py --reward zero_shot --prompts bloodmnist --output_dir runs/ddpo
The folder OUTPUT_DIR/lora is the adapter, OUTPUT_DIR/rounds.jsonl tells how the reward rose, and OUTPUT_DIR/validation
shows it. A run that was killed goes on at the beginning of its round with --resume_from_checkpoint latest.
"""

import logging
from dataclasses import dataclass, fields, replace

from visbio_diffusers import checkpoints, hub
from visbio_diffusers.adapters import AdapterConfig, add_adapter, load_base, save_adapter
from visbio_diffusers.captions import available_banks
from visbio_diffusers.config import parse, run
from visbio_diffusers.prompts import load_prompts
from visbio_diffusers.reward_tuning import RoundsConfig, round_loss
from visbio_diffusers.rewards import find_reward
from visbio_diffusers.rollouts import decoder, make_policy
from visbio_diffusers.rounds import Rounds
from visbio_diffusers.training import (
    ema_hook,
    fit,
    make_accelerator,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    trainable,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DDPOConfig(RoundsConfig, AdapterConfig):
    """Fine-tune a text-to-image pipeline to a reward, by reinforcement learning on a LoRA adapter."""


PRESETS = {
    "tiny": dict(
        num_rounds=2, num_prompts_per_round=2, num_images_per_prompt=2, sample_steps=4, train_batch_size=4,
        num_validation_prompts=2, report_to="none", reward="brightness",
    ),
    "compressibility": dict(
        reward="jpeg_compressibility", num_rounds=12, num_prompts_per_round=8, sample_steps=10, train_batch_size=40,
        learning_rate=2e-3, validation_rounds=0,
    ),
}  # fmt: skip


def count_steps(config: DDPOConfig, round_steps: int) -> DDPOConfig:
    """Return the settings with all counts of optimizer steps, which follow from those of rounds."""
    counts = {
        "max_train_steps": config.num_rounds * round_steps,
        "checkpointing_steps": config.save_rounds * round_steps,
        "logging_steps": round_steps,
    }
    defaults = {each.name: each.default for each in fields(config)}
    for name, value in counts.items():
        if getattr(config, name) not in (value, defaults[name]):
            raise ValueError(f"{name} follows from num_rounds and save_rounds, which make it {value}: leave it out")
    return replace(config, **counts)


def main(config: DDPOConfig) -> int:
    """Train, and write the adapter; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    device = str(accelerator.device.type)
    reward = find_reward(config.reward, device)
    heldout_reward = find_reward(config.heldout_reward, device) if config.heldout_reward else None
    prompts = load_prompts(config.prompts)
    if config.heldout_prompts:
        prompts = prompts._replace(heldout=load_prompts(config.heldout_prompts).train)
    pipe, facts = load_base(config)
    unet = add_adapter(pipe, config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    pipe.to(accelerator.device)
    if getattr(pipe, "vae", None) is not None:
        pipe.vae.requires_grad_(False)
    logger.info(f"{len(prompts.train)} prompts, {len(prompts.heldout)} held out; reward {reward.name}")
    policy = make_policy(
        pipe.scheduler, config.sample_steps, config.guidance_scale, config.eta, config.log_prob_reduction
    )._replace(train_empty=config.train_empty_text)
    ema = make_ema(accelerator, unet, config) if config.use_ema else None
    rounds = Rounds(accelerator, config, pipe, policy, reward, heldout_reward, prompts, ema)
    config = count_steps(config, rounds.round_steps)
    checkpoints.register(accelerator, "rounds", rounds)
    optimizer = make_optimizer(trainable(unet), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(unet, optimizer)
    hooks = [rounds.hook] if ema is None else [ema_hook(ema, unet), rounds.hook]
    loss_fn = round_loss(accelerator, config, policy, decoder(pipe), reward)
    result = fit(
        accelerator, model, optimizer, lr_scheduler, rounds.stream, loss_fn, config, hooks, rounds.round_steps
    )
    if not result.signum:
        rounds.finish()
        if accelerator.is_main_process:
            if ema is not None and not rounds.stopped:
                ema.copy_to(trainable(unet))
            record = {"reward_sha256": list(reward.sha256)}
            if config.prompts in available_banks():
                record["caption_banks"] = [config.prompts]
            hub.finish_training(save_adapter(unet, config, facts["model"], record), config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(DDPOConfig, PRESETS))
