"""Train the text-to-image UNet on labelled or captioned images.

accelerate launch train_scripts/train_text_to_image.py --preset blood-28 --dataset_name bloodmnist \
    --output_dir runs/blood-28
The folder OUTPUT_DIR/pipeline loads with `VisBioPipeline.from_pretrained`; --resume_from_checkpoint latest resumes.
"""

import inspect
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import AutoModel

from visbio_diffusers import VisBioPipeline, VisBioUNet, hub
from visbio_diffusers.alignment.joint import UNetWithHeads, joint_loss
from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.evaluation import environment, write_results
from visbio_diffusers.load import DEFAULT_MODEL, load_pipeline, load_text_encoder
from visbio_diffusers.text_to_image import CaptionedImagesConfig, denoising_loss, load_captioned_images
from visbio_diffusers.training import ema_hook, fit, make_accelerator, make_ema, make_lr_scheduler, make_optimizer
from visbio_diffusers.validation import validation_hook


logger = logging.getLogger(__name__)

UNETS = {"VisBioUNet": VisBioUNet, "UNet2DConditionModel": UNet2DConditionModel}


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(CaptionedImagesConfig):
    """Train the text-to-image UNet on labelled or captioned images."""

    text_encoder: str = field(
        default=DEFAULT_MODEL,
        metadata={
            "help": "folder or Hub id of a BERT with its tokenizer, e.g. dmis-lab/biobert-v1.1; or a pipeline's folder"
        },
    )
    pretrained_model_name_or_path: str = field(
        default="", metadata={"help": "pipeline to start from, text encoder included"}
    )
    unet_config: str = field(
        default="{}",
        metadata={"help": 'arguments of VisBioUNet as JSON, or of a Diffusers UNet named by "_class_name"'},
    )
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = field(
        default="v_prediction", metadata={"help": "what the UNet predicts"}
    )
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = field(
        default="squaredcos_cap_v2", metadata={"help": "how noise grows over the timesteps"}
    )

    alignment_weight: float = flag(0.0, "weight of a contrastive loss between the UNet's bottleneck and the caption")
    repa_weight: float = flag(0.0, "weight of aligning the tokens of the bottleneck with those of repa_model")
    repa_model: str = flag("", "folder or Hub id of a vision model, or of a dual encoder with one")
    repa_mask: float = flag(0.0, "share of the tokens hidden before they are aligned")

    def __post_init__(self) -> None:
        """Check the shape of the UNet too."""
        if min(self.alignment_weight, self.repa_weight) < 0 or not 0 <= self.repa_mask < 1:
            raise ValueError("alignment_weight and repa_weight must be at least 0, repa_mask in [0, 1)")
        if bool(self.repa_weight) != bool(self.repa_model):
            raise ValueError("repa_weight and repa_model go together: give both or neither")
        try:
            shape = json.loads(self.unet_config)
        except ValueError as error:
            raise ValueError(f"unet_config must be JSON, got {self.unet_config!r}") from error
        unet_class = UNETS.get(shape.pop("_class_name", "VisBioUNet")) if isinstance(shape, dict) else None
        if unet_class is None:
            raise ValueError(f"unet_config is for {' or '.join(UNETS)}, got {self.unet_config}")
        known = inspect.signature(unet_class.__init__).parameters
        if (self.alignment_weight or self.repa_weight) and unet_class is not VisBioUNet:
            raise ValueError("alignment_weight and repa_weight are for a VisBioUNet")
        if not set(shape) <= set(known):
            raise ValueError(f"unet_config must be a JSON object of {', '.join(known)[6:]}, got {self.unet_config}")
        super().__post_init__()


# 7.6 M parameters; the result of `blood-28` is in model_cards/visbio-blood-28/README.md. Two presets train the same
# model on a GPU: `rtx3050` took 1.0 GB, `colab-t4` waits for a measurement on such a card.
BLOOD = dict(
    unet_config='{"layers_per_block": 1, "num_transformer_layers": 5}', random_flip="dihedral", train_batch_size=64,
    learning_rate=7e-4, lr_scheduler="cosine", lr_warmup_steps=100, ema_decay=0.998, max_train_steps=2100,
    checkpointing_steps=250,
)  # fmt: skip
# 25.3 M parameters, for two kinds of microscopy at once; the result is in model_cards/visbio-micro-64/README.md.
MICRO_64 = dict(
    unet_config='{"block_out_channels": [64, 128, 384], "num_transformer_layers": 8, "film_dim": 256}', resolution=64,
    caption_bank="bloodmnist", dataset_weights=[0.6, 0.4], tile_overlap=0.5, random_flip="dihedral",
    train_batch_size=256, mixed_precision="bf16", compile=True, learning_rate=1e-3, adam_beta2=0.99,
    lr_scheduler="cosine", lr_warmup_steps=300, ema_decay=0.999, max_train_steps=10_000, checkpointing_steps=2000,
    logging_steps=100, validation_steps=2000, max_shard_size="15MB",
)  # fmt: skip
PRESETS = {
    "tiny": dict(
        unet_config='{"block_out_channels": [16, 32], "num_transformer_layers": 1, "film_dim": 32}',
        max_train_samples=64, captions_per_class=8, train_batch_size=8, validation_steps=0, report_to="none",
    ),
    "blood-28": BLOOD,
    "micro-64": MICRO_64,
    "rtx3050": {**BLOOD, "mixed_precision": "bf16", "max_train_steps": 10_000, "checkpointing_steps": 1000},  # 4 GB
    "colab-t4": {**BLOOD, "mixed_precision": "fp16", "max_train_steps": 10_000, "checkpointing_steps": 1000},
}  # fmt: skip


def make_scheduler(prediction_type: str, beta_schedule: str = "squaredcos_cap_v2") -> DDIMScheduler:
    """Return the noise schedule of the training."""
    return DDIMScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon",  # where all is noise, the noise tells nothing
        timestep_spacing="trailing",
    )


def make_sampler(scheduler: DDIMScheduler) -> DPMSolverMultistepScheduler:
    """Return the sampler that is saved with the model: new noise in each step corrects what earlier ones got wrong."""
    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")


def load_models(config: TextToImageConfig):
    """Return UNet, text encoder, tokenizer and scheduler: of a pipeline, or a new UNet for the text encoder."""
    given = json.loads(config.unet_config)
    if config.pretrained_model_name_or_path:
        return load_pretrained(config, given)
    text_encoder, tokenizer = load_text_encoder(config.text_encoder)
    shape = {"sample_size": config.resolution, "cross_attention_dim": text_encoder.config.hidden_size}
    shape["in_channels"] = shape["out_channels"] = given.get("in_channels", 3)
    unet = UNETS[given.pop("_class_name", "VisBioUNet")](**{**shape, **given})
    return unet, text_encoder, tokenizer, make_scheduler(config.prediction_type, config.beta_schedule)


def load_pretrained(config: TextToImageConfig, given: dict):
    """Return the parts of a pipeline to go on from; refuse settings that contradict it."""
    pipe, _ = load_pipeline(config.pretrained_model_name_or_path, "cpu")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    found = {
        "_class_name": type(pipe.unet).__name__,
        **pipe.unet.config,
        "prediction_type": scheduler.config.prediction_type,
    }
    for name, value in {**given, "prediction_type": config.prediction_type}.items():
        if found[name] != (tuple(value) if isinstance(found[name], tuple) else value):
            raise ValueError(f"{config.pretrained_model_name_or_path} has {name} {found[name]}, not {value}")
    pipe.unet.register_to_config(sample_size=config.resolution)
    return pipe.unet.float(), pipe.text_encoder.float(), pipe.tokenizer, scheduler


def with_loss(accelerator, unet, scheduler, config: TextToImageConfig):
    """Return what is trained, the UNet or the UNet with heads, and the loss function for it."""
    if not config.alignment_weight and not config.repa_weight:
        return unet, denoising_loss(accelerator, scheduler, config)
    vision_model, width = None, 0
    if config.repa_model:
        vision_model = AutoModel.from_pretrained(config.repa_model, dtype=torch.float32)
        vision_model = getattr(vision_model, "vision_model", vision_model).requires_grad_(False).eval()
        vision_model, width = vision_model.to(accelerator.device), getattr(vision_model.config, "hidden_size", None)
        if not isinstance(width, int) or unet.config.in_channels != 3:
            raise ValueError(f"repa_model {config.repa_model} gives no tokens of one width, or images are grey")
    trained = UNetWithHeads(unet, bool(config.alignment_weight), width, config.repa_mask)
    return trained, joint_loss(accelerator, scheduler, config, vision_model)


def main(config: TextToImageConfig) -> int:
    """Train, and write the pipeline; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    unet, text_encoder, tokenizer, scheduler = load_models(config)
    images = load_captioned_images(accelerator, config, unet.config.in_channels, text_encoder, tokenizer)
    logger.info(f"UNet of {unet.num_parameters() / 1e6:.2f} M parameters")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained, loss_fn = with_loss(accelerator, unet, scheduler, config)
    optimizer = make_optimizer(trained.parameters(), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
    if config.compile:
        unet.compile(mode=config.compile_mode)
    model, optimizer = accelerator.prepare(trained, optimizer)
    ema = make_ema(accelerator, unet, config) if config.use_ema else None

    def pipeline(text_encoder=None, tokenizer=None) -> VisBioPipeline:
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        bare = getattr(bare, "unet", bare)
        return VisBioPipeline(
            unet=bare, scheduler=make_sampler(scheduler), text_encoder=text_encoder, tokenizer=tokenizer
        )

    folder, every = Path(config.output_dir, "validation"), config.validation_steps
    drawn = images.prompts, config.num_validation_images, every, folder
    hooks = [validation_hook(accelerator, pipeline, images.embed, ema, *drawn)]
    if ema:
        hooks.insert(0, ema_hook(ema, unet))
    result = fit(accelerator, model, optimizer, lr_scheduler, images.stream, loss_fn, config, hooks)
    if accelerator.is_main_process and not result.signum:
        if ema:
            ema.copy_to(unet.parameters())
        folder = save_pipeline(pipeline(text_encoder, tokenizer), config, images.banks)
        hub.finish_training(folder, config, repo_id)
    accelerator.end_training()
    return result.signum


def save_pipeline(pipe: VisBioPipeline, config: TextToImageConfig, banks: list[str]) -> Path:
    """Write the pipeline to OUTPUT_DIR/pipeline, whole or not at all; `banks` are those whose classes it has seen."""
    if config.save_dtype == "fp16":
        pipe.unet.half()
        pipe.text_encoder.half()

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder, max_shard_size=config.max_shard_size)
        file = folder / "text_encoder" / "config.json"  # transformers would load it in fp16, unlike Diffusers the UNet
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")
        record = {**environment(), "config": asdict(config), "caption_banks": banks}
        write_results(record, folder / "training.json")

    return save_folder(Path(config.output_dir, "pipeline"), write)


if __name__ == "__main__":
    run(main, parse(TextToImageConfig, PRESETS))
