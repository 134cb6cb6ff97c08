"""One row of the generative benchmark: train it where it needs a training, draw from it, measure it.

python train_scripts/benchmark.py --row both --dataset_name bloodmnist --output_dir runs/benchmark
Writes OUTPUT_DIR/ROW/results.json with its report; model_cards/benchmark-blood-28/README.md holds the protocol.
A killed run goes on when it is started again.
"""

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from visbio_diffusers import default_model, load_image_dataset
from visbio_diffusers.config import parse, run
from visbio_diffusers.evaluation import Split, as_split, balanced_labels, write_results
from visbio_diffusers.evaluation.benchmark import EvaluateConfig, evaluate
from visbio_diffusers.evaluation.protocol import match_classes
from visbio_diffusers.files import whole_file


OURS = {"layers_per_block": 1, "num_transformer_layers": 5}
# As many parameters as ours, and the layout of Diffusers' own small UNets: no attention at the highest resolution.
UNET2D = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [96, 96, 96],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
}
UNETS = {
    "both": OURS,
    "film": {**OURS, "use_cross_attention": False},
    "cross_attention": {**OURS, "use_film": False},
    "unet2d": UNET2D,
    "unet2d_our_recipe": UNET2D,
}
# Of Diffusers' training examples: the noise as target, a linear schedule, 1e-4 after 500 steps of warm-up, slow EMA.
THEIR_RECIPE = {
    "prediction_type": "epsilon", "beta_schedule": "linear", "learning_rate": "1e-4",
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "500", "ema_decay": "0.9999",
}  # fmt: skip
# Without an end in steps a learning rate cannot fall towards it.
OUR_RECIPE = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "100"}
TIMED = {"unet2d": THEIR_RECIPE, "unet2d_our_recipe": OUR_RECIPE}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure one row of the benchmark."""

    row: Literal["real", "checkpoint", "both", "film", "cross_attention", "unet2d", "unet2d_our_recipe"] = field(
        metadata={"help": "unseen real images, a finished model, a text route, or Diffusers' UNet in the time of both"}
    )
    dataset_name: str = field(metadata={"help": "flag, npz or folder with splits train, val and test"})
    output_dir: str = field(metadata={"help": "folder of all rows"})
    caption_bank: str = field(default="", metadata={"help": "bank of a set that has none of its own"})
    model: str = field(default="", metadata={"help": "of the row checkpoint; default is the one that ships"})
    generator_preset: str = field(default="blood-28", metadata={"help": "preset of train_text_to_image.py"})
    max_train_steps: int = field(default=800, metadata={"help": "optimizer steps of 64 images, of each text route"})
    num_images: int = field(default=1024, metadata={"help": "images to draw, as many of every class"})
    num_wording_images: int = field(default=256, metadata={"help": "images to draw from held-out wording"})
    evaluators: str = field(default="", metadata={"help": "see visbio evaluate"})
    cas: bool = field(default=False, metadata={"help": "see visbio evaluate"})
    flip: bool = field(default=True, metadata={"help": "mirror images in training and judging; not of left and right"})
    seed: int = field(default=0, metadata={"help": "of training and drawing"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where to measure"})

    @property
    def folder(self) -> Path:
        """Folder of the row."""
        return Path(self.output_dir, self.row)


def unseen_images(config: BenchmarkConfig) -> dict:
    """Write images of the validation split as if a model had drawn them, and return the settings that measure them."""
    split = as_split(load_image_dataset(config.dataset_name, "val", caption_bank=config.caption_bank or None))
    rows = match_classes(split.labels, balanced_labels(config.num_images, int(split.labels.max()) + 1), config.seed)
    split = Split(split.images[rows], split.labels[rows])
    file = config.folder / "real.npz"
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, train_images=split.images, train_labels=split.labels)
    return {"images": str(file)}


def train(config: BenchmarkConfig) -> tuple[int, dict]:
    """Train the row, going on where an earlier run stopped.

    Returns:
        The number of the signal that interrupted it, or 0, and the settings that measure it.
    """
    script = runpy.run_path(str(Path(__file__).with_name("train_text_to_image.py")))
    image = load_image_dataset(config.dataset_name, caption_bank=config.caption_bank or None)[0]["image"]
    settings = {
        "preset": config.generator_preset, "dataset_name": config.dataset_name, "caption_bank": config.caption_bank,
        "output_dir": str(config.folder / "training"), "unet_config": json.dumps(UNETS[config.row]),
        "resolution": len(image), "seed": config.seed, "validation_steps": 0, "report_to": "none",
        "max_train_steps": config.max_train_steps, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    if not config.flip:
        settings["random_flip"] = "none"
    if config.row in TIMED:
        minutes = training_seconds(config, "both") / 60
        settings |= {**TIMED[config.row], "max_train_steps": 1_000_000, "max_train_minutes": minutes}
    argv = [f"--{name}={value}" for name, value in settings.items() if value != ""]
    asked = script["parse"](script["TextToImageConfig"], script["PRESETS"], argv)
    pipeline = config.folder / "training" / "pipeline"
    if pipeline.exists():
        used = json.loads((pipeline / "training.json").read_text())["config"]
        for name in ("max_train_steps", "seed", "unet_config"):
            if used[name] != getattr(asked, name):
                raise ValueError(f"{pipeline} was trained with {name} {used[name]}: name another --output_dir")
    signum = 0 if pipeline.exists() else script["main"](asked)
    counts = {"num_images": config.num_images, "num_wording_images": config.num_wording_images}
    return signum, {"model": str(pipeline), **counts}


def training_seconds(config: BenchmarkConfig, row: str) -> float:
    """Return how long a row has been trained."""
    file = Path(config.output_dir, row, "training", "training_time.json")
    if not file.exists():
        raise ValueError(f"{config.row} is trained for as long as {row}: run --row {row} first")
    return json.loads(file.read_text())["seconds"]


def main(config: BenchmarkConfig) -> int:
    """Measure the row, and add to its results what was trained, how long and on how many images."""
    budget = {}
    if config.row == "real":
        settings = unseen_images(config)
    elif config.row == "checkpoint":
        settings = {"model": config.model or str(default_model())}
        settings |= {"num_images": config.num_images, "num_wording_images": config.num_wording_images}
    else:
        signum, settings = train(config)
        if signum:
            return signum
        steps = len((config.folder / "training" / "loss.jsonl").read_text().splitlines())
        used = json.loads(Path(settings["model"], "training.json").read_text())["config"]
        budget = {"training_seconds": training_seconds(config, config.row), "unet_config": used["unet_config"]}
        budget["images_seen"] = steps * used["train_batch_size"] * used["gradient_accumulation_steps"]
    output = config.folder / "results.json"
    names = ("dataset_name", "caption_bank", "evaluators", "cas", "flip", "seed")
    common = {name: getattr(config, name) for name in names}
    evaluate(EvaluateConfig(output=str(output), device=config.device, **common, **settings))
    write_results({"row": config.row, **budget, **json.loads(output.read_text())}, output)
    return 0


if __name__ == "__main__":
    run(main, parse(BenchmarkConfig, {}))
