"""Does a generator help where real images are few? Trains one on 10, 50 and 100 images of a class, and asks.

python train_scripts/evaluate_low_data.py --dataset_name bloodmnist --output_dir runs/low-data

For each number: a generator is trained on those images alone, draws a balanced set, and classifiers are trained on the
real images, on both, and on the generated ones; their accuracy on the real test split goes to OUTPUT_DIR/results.json.
A killed run goes on when it is started again.
"""

import json
import runpy
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from visbio_diffusers import evaluation, load_bank, load_image_dataset
from visbio_diffusers.config import parse, run
from visbio_diffusers.evaluation import downstream
from visbio_diffusers.files import whole_file
from visbio_diffusers.load import load_pipeline


@dataclass(frozen=True, kw_only=True)
class LowDataConfig:
    """Measure what generated images add to a few real ones in the training of a classifier."""

    dataset_name: str = field(metadata={"help": "real images, splits train and test: flag, npz or folder"})
    output_dir: str = field(metadata={"help": "folder of the generators, their images and results.json"})
    caption_bank: str = field(default="", metadata={"help": "bank of a set that has none of its own"})
    per_class: list[int] = field(default_factory=lambda: [10, 50, 100], metadata={"help": "real images of each class"})
    synthetic_per_class: int = field(default=100, metadata={"help": "images to generate of each class"})
    generator_preset: str = field(default="blood-28", metadata={"help": "preset of train_text_to_image.py"})
    generator_steps: int = field(default=1500, metadata={"help": "optimizer steps of a generator"})
    classifier_steps: int = field(default=600, metadata={"help": "optimizer steps of a classifier"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one classifier for each"})
    seed: int = field(default=0, metadata={"help": "of the choice of images and of those generated"})
    flip: bool = field(default=True, metadata={"help": "train classifiers on mirror images too"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where to run"})

    def __post_init__(self) -> None:
        """Check what the types do not."""
        counts = [*self.per_class, self.synthetic_per_class, self.generator_steps, self.classifier_steps]
        if min(counts) < 1 or not self.per_class or not self.seeds:
            raise ValueError("per_class, synthetic_per_class and the steps must be at least 1, seeds at least one")


def train_generator(config: LowDataConfig, real: evaluation.Split, bank: str, folder: Path) -> tuple[int, Path]:
    """Train a generator on `real` alone, going on where an earlier run stopped.

    Returns:
        The number of the signal that interrupted it, or 0, and the folder of the pipeline.
    """
    images, pipeline = folder / "real.npz", folder / "generator" / "pipeline"
    if not images.exists():
        with whole_file(images) as temporary, temporary.open("wb") as stream:
            np.savez(stream, train_images=real.images, train_labels=real.labels[:, None])
    if pipeline.exists():
        steps = json.loads((pipeline / "training.json").read_text())["config"]["max_train_steps"]
        if steps != config.generator_steps:
            raise ValueError(f"{pipeline} was trained for {steps} steps: delete it, or name another --output_dir")
        return 0, pipeline
    script = runpy.run_path(str(Path(__file__).with_name("train_text_to_image.py")))
    settings = {
        "preset": config.generator_preset, "dataset_name": str(images), "caption_bank": bank,
        "output_dir": str(folder / "generator"), "resolution": real.images.shape[1], "seed": config.seed,
        "max_train_steps": config.generator_steps, "validation_steps": 0, "report_to": "none",
        "resume_from_checkpoint": "latest",
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in settings.items()]
    argv += [] if config.flip else ["--random_flip=none"]
    return script["main"](script["parse"](script["TextToImageConfig"], script["PRESETS"], argv)), pipeline


def main(config: LowDataConfig) -> int:
    """Measure, and write the results anew after every number of images."""
    bank = config.caption_bank or None
    real = [load_image_dataset(config.dataset_name, split, caption_bank=bank) for split in ("train", "test")]
    if real[0].bank is None:
        raise ValueError(f"{real[0].name} has no captions for its classes: name a --caption_bank")
    train, test = map(evaluation.as_split, real)
    words, output = load_bank(real[0].bank), Path(config.output_dir, "results.json")
    results = {**evaluation.environment(), "dataset": real[0].name, "settings": asdict(config), "runs": []}
    for per_class in config.per_class:
        few = downstream.few_of_each(train, per_class, config.seed)
        folder = Path(config.output_dir, f"{per_class}-of-each-seed-{config.seed}")
        signum, trained = train_generator(config, few, real[0].bank, folder)
        if signum:
            return signum
        pipe, facts = load_pipeline(str(trained), config.device)
        labels = evaluation.balanced_labels(
            config.synthetic_per_class * len(words.class_names), len(words.class_names)
        )
        prompts = [words.plain_caption(int(label)) for label in labels]
        store = folder / "images" / evaluation.store_name(facts, prompts, config.seed)
        drawn = evaluation.generate_images(pipe, prompts, config.seed, store=store)
        synthetic = evaluation.Split(drawn.images, labels)
        settings = {"steps": config.classifier_steps, "seeds": config.seeds, "flip": config.flip}
        sets = {"real": few, "real_and_synthetic": downstream.mixed(few, synthetic), "synthetic": synthetic}
        right = {
            name: downstream.answers_after_training(
                split, test, len(words.class_names), device=config.device, **settings
            )
            for name, split in sets.items()
        }
        scores = {name: downstream.accuracy(answers) for name, answers in right.items()}
        scores["gain"] = downstream.gain(right["real_and_synthetic"], right["real"])
        results["runs"].append({"per_class": per_class, "generator_sha256": facts["model_sha256"], **scores})
        evaluation.write_results(results, output)
        sys.stdout.write(json.dumps({name: entry["value"] for name, entry in scores.items()}) + "\n")
    return 0


if __name__ == "__main__":
    run(main, parse(LowDataConfig, {}))
