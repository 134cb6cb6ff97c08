"""Train a LoRA adapter of a text-to-image pipeline on labelled or captioned images.

accelerate launch train_scripts/train_text_to_image_lora.py --dataset_name my_images --output_dir runs/my-adapter
The folder OUTPUT_DIR/lora loads with `pipe.load_lora_weights`; --resume_from_checkpoint latest resumes.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusers import DDIMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from visbio_diffusers import VisBioPipeline, hub
from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.evaluation import environment, write_results
from visbio_diffusers.load import DEFAULT_MODEL, load_pipeline
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

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True, kw_only=True)
class LoraTrainConfig(CaptionedImagesConfig):
    """Train a LoRA adapter of a text-to-image pipeline on labelled or captioned images."""

    pretrained_model_name_or_path: str = flag(DEFAULT_MODEL, "pipeline to adapt: folder, Hub id, or the one we ship")
    rank: int = flag(8, "rank of the adapter: width of its two matrices")
    lora_alpha: float = flag(8.0, "the adapter is weighed by lora_alpha / rank")
    lora_dropout: float = flag(0.0, "dropout before the adapter")
    target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION),
        metadata={"help": "layers to adapt, by the end of their names; conv1, conv2, film and ff.net.2 are others"},
    )

    def __post_init__(self) -> None:
        """Check the shape of the adapter too."""
        super().__post_init__()
        if min(self.rank, len(self.target_modules)) < 1 or self.lora_alpha <= 0:
            raise ValueError("rank must be at least 1, lora_alpha above 0, and target_modules name a layer")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")


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


def add_adapter(pipe: VisBioPipeline, config: LoraTrainConfig):
    """Freeze the UNet of a pipeline, give it an adapter in fp32, and return it.

    Raises:
        ValueError: if it has no layers of the names asked for.
    """
    unet = pipe.unet.requires_grad_(False).float()
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        init_lora_weights="gaussian",
    )
    ends = [f".{name}" for name, _ in unet.named_modules()]
    for target in config.target_modules:
        if not any(end.endswith(f".{target}") for end in ends):
            raise ValueError(f"{config.pretrained_model_name_or_path} has no layers {target}: choose --target_modules")
    try:
        unet.add_adapter(lora)
    except ValueError as error:
        raise ValueError(f"target_modules {config.target_modules} cannot be adapted: {error}") from error
    return unet


def save_adapter(unet, config: LoraTrainConfig, banks: list[str], base: str) -> Path:
    """Write the adapter to OUTPUT_DIR/lora, whole or not at all, and return that."""
    weights = get_peft_model_state_dict(unet)
    if config.save_dtype == "fp16":
        weights = {name: value.half() for name, value in weights.items()}

    def write(folder: Path) -> None:
        metadata = unet.peft_config["default"].to_dict()
        VisBioPipeline.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)
        record = {**environment(), "config": asdict(config), "caption_banks": banks, "base_model": base}
        write_results(record, folder / "training.json")

    return save_folder(Path(config.output_dir, "lora"), write)


def main(config: LoraTrainConfig) -> int:
    """Train, and write the adapter; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    base = config.pretrained_model_name_or_path
    pipe, facts = load_pipeline(None if base == DEFAULT_MODEL else base, "cpu")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    channels = pipe.unet.config.in_channels
    images = load_captioned_images(accelerator, config, channels, pipe.text_encoder.float(), pipe.tokenizer)
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
        hub.finish_training(save_adapter(unet, config, images.banks, facts["model"]), config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(LoraTrainConfig, PRESETS))
