"""Train a LoRA adapter of a text-to-image pipeline on labelled or captioned images.

accelerate launch train_scripts/train_text_to_image_lora.py --dataset_name my_images --output_dir runs/my-adapter
The folder OUTPUT_DIR/lora loads with `pipe.load_lora_weights`; --resume_from_checkpoint latest resumes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDIMScheduler

from visbio_diffusers import VisBioPipeline, hub
from visbio_diffusers.adapters import ATTENTION, AdapterConfig, add_adapter, load_base, save_adapter
from visbio_diffusers.config import parse, run
from visbio_diffusers.text_to_image import CaptionedImagesConfig, denoising_loss, load_captioned_images
from visbio_diffusers.training import (
    ema_hook,
    fit,
    make_accelerator,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    trainable,
)
from visbio_diffusers.validation import validation_hook


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoraTrainConfig(AdapterConfig, CaptionedImagesConfig):
    """Train a LoRA adapter of a text-to-image pipeline on labelled or captioned images."""


# A new domain, with other colours and textures, needs the convolutions too.
DOMAIN = dict(
    target_modules=[*ATTENTION, "conv1", "conv2", "conv_in", "conv_out"], rank=8, random_flip="dihedral",
    train_batch_size=64, learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=50, ema_decay=0.99,
    max_train_steps=600, checkpointing_steps=100, validation_steps=0,
)  # fmt: skip
PRESETS = {
    "tiny": dict(max_train_samples=64, train_batch_size=8, validation_steps=0, report_to="none", captions_per_class=8),
    "domain": DOMAIN,
}


def main(config: LoraTrainConfig) -> int:
    """Train, and write the adapter; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    pipe, facts = load_base(config)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    channels = pipe.unet.config.in_channels
    images = load_captioned_images(accelerator, config, channels, pipe.text_encoder, pipe.tokenizer)
    unet = add_adapter(pipe, config)
    adapter = trainable(unet)
    logger.info(f"adapter of {sum(p.numel() for p in adapter):,} parameters on {unet.num_parameters():,}")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = make_optimizer(adapter, config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = make_ema(accelerator, unet, config) if config.use_ema else None

    def pipeline() -> VisBioPipeline:
        return VisBioPipeline(unet=unet, scheduler=pipe.scheduler, text_encoder=None, tokenizer=None)

    folder, every = Path(config.output_dir, "validation"), config.validation_steps
    drawn = images.prompts, config.num_validation_images, every, folder
    hooks = [validation_hook(accelerator, pipeline, images.embed, ema, *drawn, adapter=True)]
    if ema:
        hooks.insert(0, ema_hook(ema, unet))
    loss_fn = denoising_loss(accelerator, scheduler, config)
    result = fit(accelerator, model, optimizer, lr_scheduler, images.stream, loss_fn, config, hooks)
    if accelerator.is_main_process and not result.signum:
        if ema:
            ema.copy_to(adapter)
        folder = save_adapter(unet, config, facts["model"], {"caption_banks": images.banks}, config.save_dtype)
        hub.finish_training(folder, config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(LoraTrainConfig, PRESETS))
