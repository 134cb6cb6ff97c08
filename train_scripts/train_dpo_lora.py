"""Fine-tune a text-to-image pipeline to preferred images: Diffusion-DPO on a LoRA adapter.

accelerate launch train_scripts/train_dpo_lora.py --preferences pairs.jsonl --output_dir runs/dpo
The pairs are JSON lines: prompt, image_w (the better one), image_l, who, when. The folder OUTPUT_DIR/lora is the
adapter; --resume_from_checkpoint latest resumes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from visbio_diffusers import hub
from visbio_diffusers.adapters import AdapterConfig, add_adapter, load_base, save_adapter
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.losses import denoising_errors, stratified_timesteps
from visbio_diffusers.objectives import preference_loss
from visbio_diffusers.preferences import load_preferences, preference_batches
from visbio_diffusers.reward_tuning import base_model
from visbio_diffusers.text import EmbeddingCache
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
class DPOConfig(AdapterConfig):
    """Fine-tune a text-to-image pipeline to preferred images."""

    preferences: str = flag("", "JSON lines: prompt, image_w (the better one), image_l, who, when")
    beta: float = flag(200.0, "how strongly the base model holds back, on the mean squared error of the prediction")
    train_batch_size: int = flag(32, "pairs per process and micro-batch")
    max_train_steps: int = flag(200, "optimizer steps to take in all, resumed ones included")
    learning_rate: float = flag(1e-3, "highest learning rate of AdamW")
    ema_decay: float = flag(0.95, "highest decay of the average; it starts low and rises")

    def __post_init__(self) -> None:
        """Check the settings of this script too."""
        super().__post_init__()
        self._require("above 0", lambda value: value > 0, "beta")
        if self.compile:
            raise ValueError("compile is not supported here: leave it out")
        if not self.preferences:
            raise ValueError("nothing to train on: give --preferences, a file of JSON lines")


PRESETS = {"tiny": dict(max_train_steps=2, train_batch_size=4, report_to="none")}


def dpo_loss(accelerator, scheduler, config: DPOConfig):
    """Return the loss function for `fit`: both images of a pair meet the same noise at the same timestep."""

    def loss_fn(model, batch):
        unet = accelerator.unwrap_model(model)
        with accelerator.autocast():
            better, states, mask = batch["better"], batch["encoder_hidden_states"], batch["mask"]
            noise = torch.randn_like(better)
            steps = stratified_timesteps(len(better), scheduler.config.num_train_timesteps, better.device)
            both = torch.cat([better, batch["worse"]]), torch.cat([noise] * 2), torch.cat([steps] * 2)
            text = torch.cat([states] * 2), torch.cat([mask] * 2)
            with torch.no_grad(), base_model(unet):
                base = denoising_errors(unet, scheduler, *both, *text)
            errors = denoising_errors(model, scheduler, *both, *text)
        loss = preference_loss(*errors.chunk(2), *base.chunk(2), beta=config.beta)
        gain = (base - errors).chunk(2)
        return loss, {"preferred": (gain[0] > gain[1]).float().mean()}

    return loss_fn


def main(config: DPOConfig) -> int:
    """Train, and write the adapter; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    pipe, facts = load_base(config)
    if getattr(pipe, "vae", None) is not None:
        raise ValueError(f"{facts['model']} draws in latents: Diffusion-DPO is for pipelines in pixel space so far")
    pairs = load_preferences(config.preferences, pipe.unet.config.sample_size, pipe.unet.config.in_channels)
    with accelerator.main_process_first():
        folder = Path(config.output_dir, "cache")
        embed = EmbeddingCache(list(dict.fromkeys(pairs.prompts)), pipe.text_encoder, pipe.tokenizer, folder)
    logger.info(f"{len(pairs.prompts)} pairs of {len(embed.row)} prompts")
    unet = add_adapter(pipe, config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = make_optimizer(trainable(unet), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = make_ema(accelerator, unet, config) if config.use_ema else None

    def stream(start: int):
        share = accelerator.process_index, accelerator.num_processes
        for batch in preference_batches(pairs, config.train_batch_size, config.seed, start, *share):
            states, mask = embed(batch.pop("prompts"))
            yield {**batch, "encoder_hidden_states": states, "mask": mask}

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    loss_fn, hooks = dpo_loss(accelerator, scheduler, config), [ema_hook(ema, unet)] if ema else []
    result = fit(accelerator, model, optimizer, lr_scheduler, stream, loss_fn, config, hooks)
    if accelerator.is_main_process and not result.signum:
        if ema:
            ema.copy_to(trainable(unet))
        hub.finish_training(save_adapter(unet, config, facts["model"], {"pairs": len(pairs.prompts)}), config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(DPOConfig, PRESETS))
