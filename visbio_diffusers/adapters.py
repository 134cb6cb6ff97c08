"""LoRA adapters in training: their settings, how a UNet gets one, and how it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import TrainConfig, flag
from visbio_diffusers.evaluation import environment, write_results
from visbio_diffusers.load import DEFAULT_MODEL, load_pipeline


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TrainConfig):
    """Settings of the training of a LoRA adapter."""

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


def load_base(config: AdapterConfig):
    """Return the pipeline to adapt, on the CPU in float32, and what `load_pipeline` says of it."""
    base = config.pretrained_model_name_or_path
    pipe, facts = load_pipeline(None if base == DEFAULT_MODEL else base, "cpu")
    pipe.text_encoder.float()
    return pipe, facts


def add_adapter(pipe, config: AdapterConfig):
    """Freeze the UNet of a pipeline, give it an adapter in fp32, and return it.

    Raises:
        ValueError: if it has no layers of the names asked for, or is to be compiled.
    """
    if config.compile:
        raise ValueError("compile is not supported with an adapter: leave it out")
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


def save_adapter(unet, config: AdapterConfig, base: str, record: dict[str, Any], dtype: str = "fp16") -> Path:
    """Write the adapter to OUTPUT_DIR/lora, whole or not at all, and return that.

    Args:
        unet: with the adapter.
        config (`AdapterConfig`), base (`str`): its settings, and the name of the pipeline it is for.
        record (`dict`): what else its training.json is to say.
        dtype (`str`): "fp16" or "fp32".
    """
    weights = get_peft_model_state_dict(unet)
    if dtype == "fp16":
        weights = {name: value.half() for name, value in weights.items()}

    def write(folder: Path) -> None:
        metadata = unet.peft_config["default"].to_dict()
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata
        )
        said = {**environment(), "config": asdict(config), "base_model": base, **record}
        write_results(said, folder / "training.json")

    return save_folder(Path(config.output_dir, "lora"), write)
