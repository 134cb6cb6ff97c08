"""The settings by which scripts that measure one thing draw, and the drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline

from visbio_diffusers.config import flag
from visbio_diffusers.evaluation.sampling import drawn_by, generate_images, store_name
from visbio_diffusers.load import load_pipeline


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Which model draws, and how; subclass it to add what is measured."""

    output: str = field(metadata={"help": "JSON file for the results; pictures go beside it"})
    model: str = flag("", "folder or Hub id of the pipeline to measure; default is the one that we ship")
    lora: str = flag("", "LoRA adapter to draw with: folder, file or Hub id")
    guidance_scale: float | None = flag(None, "default is the pipeline's")
    guidance_interval: list[float] = field(
        default_factory=list, metadata={"help": "low and high share of the timesteps that are guided"}
    )
    num_inference_steps: int = flag(0, "denoising steps; 0 is the pipeline's default")
    batch_size: int = flag(64, "images generated at once")
    seed: int = flag(0, "seed of the generated images, and of the choice of real ones")
    evaluators: str = flag("", "folder of the networks that judge, trained if empty; default is beside the output")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to generate and to measure")
    dtype: Literal["float32", "float16", "bfloat16"] = flag("float32", "of the model that draws")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if Path(self.output).suffix != ".json" or Path(self.output).is_dir():
            raise ValueError(f"output must be a file that ends in .json, got {self.output}")
        if self.batch_size < 1 or min(self.seed, self.num_inference_steps) < 0:
            raise ValueError("batch_size must be at least 1, seed and num_inference_steps at least 0")

    @property
    def judges(self) -> Path:
        """The folder of the networks that judge."""
        return Path(self.evaluators or Path(self.output).with_suffix("") / "evaluators")

    @property
    def options(self) -> dict:
        """What is given to the pipeline's call beside the prompts."""
        options = {"num_inference_steps": self.num_inference_steps, "guidance_interval": self.guidance_interval}
        options = {name: value for name, value in options.items() if value}
        return options if self.guidance_scale is None else options | {"guidance_scale": self.guidance_scale}

    def load(self) -> tuple[DiffusionPipeline, dict]:
        """Return the pipeline and what is known of it, see [`load_pipeline`]."""
        return load_pipeline(self.model or None, self.device, self.dtype, self.lora or None)

    def draw(self, pipe: DiffusionPipeline, facts: dict, prompts: list[str]) -> np.ndarray:
        """Return an image of each prompt, uint8 `(n, height, width, channels)`; a call that was killed goes on.

        Equal prompts that follow each other have different seeds, equal lists of prompts the same images.
        """
        request = drawn_by(pipe, facts), prompts, self.seed, self.batch_size, self.dtype, self.options
        store = Path(self.output).with_suffix("") / "images" / store_name(*request)
        return generate_images(pipe, prompts, self.seed, self.batch_size, store=store, **self.options).images
