"""Measure a text-to-image model of labelled images, or any set of labelled images, against a real data set.

python train_scripts/evaluate.py --model model_cards/visbio-blood-28 --dataset_name bloodmnist --output results.json
python train_scripts/evaluate.py --images generated.npz --dataset_name bloodmnist --output results.json
python train_scripts/evaluate.py --model runs/blood --dataset_name bloodmnist --guidance_scale 1 1.5 2 --fast \
    --output sweep.json

The first run on a data set trains two evaluators on its train split and keeps them in `--evaluators`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visbio_diffusers import VisBioPipeline, evaluation, load_bank, load_image_dataset
from visbio_diffusers.captions import CaptionBank
from visbio_diffusers.config import parse, run
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation import Reference, Split
from visbio_diffusers.load import load_pipeline


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure generated images: fidelity, diversity, distance to real ones, near-copies, usefulness for training."""

    dataset_name: str = field(metadata={"help": "real images, splits train and test: flag, npz or folder"})
    output: str = field(metadata={"help": "JSON file for the results; the Markdown table goes beside it"})
    caption_bank: str = _flag("", "bank of a set that has none of its own: name, or YAML file")
    model: str = _flag("", "folder or Hub id of the pipeline to measure")
    images: str = _flag("", "instead of a model: npz with train_images and train_labels, or a labelled image folder")
    num_images: int = _flag(1024, "images to generate, as many of every class")
    guidance_scale: list[float] = field(
        default_factory=list, metadata={"help": "one or more values, each measured; default is the pipeline's"}
    )
    guidance_interval: list[float] = field(
        default_factory=list, metadata={"help": "low and high share of the timesteps that are guided"}
    )
    num_inference_steps: int = _flag(0, "denoising steps; 0 is the pipeline's default")
    batch_size: int = _flag(64, "images generated at once")
    seed: int = _flag(0, "seed of the generated images, the real images beside them, and the bootstrap")
    evaluators: str = _flag("runs/evaluators", "folder of the evaluators of this data set; trained when empty")
    evaluator_steps: int = _flag(2000, "optimizer steps of an evaluator")
    cas_steps: int = _flag(600, "optimizer steps of a classifier trained on the generated images alone")
    flip: bool = _flag(True, "train classifiers on mirror images too; not where left and right are classes")
    fast: bool = _flag(False, "leave out the classifiers trained on generated images")
    keep: bool = _flag(False, "keep the generated images as npz beside the results")
    device: str = _flag("cuda" if torch.cuda.is_available() else "cpu", "where to generate and to measure")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if bool(self.model) == bool(self.images):
            raise ValueError("give either --model or --images")
        if self.images and (self.guidance_scale or self.guidance_interval or self.num_inference_steps):
            raise ValueError("guidance_scale, guidance_interval and num_inference_steps need --model")
        if min(self.num_images, self.batch_size, self.evaluator_steps, self.cas_steps) < 1:
            raise ValueError("num_images, batch_size, evaluator_steps and cas_steps must be at least 1")


def sample_and_measure(
    pipe: VisBioPipeline,
    bank: CaptionBank,
    labels: np.ndarray,
    reference: Reference,
    config: EvaluateConfig,
    options: dict,
) -> dict:
    """Draw images by plain and by held-out prompts, and return all their measures; `options` go to the pipeline."""
    started = time.perf_counter()
    prompts = [bank.plain_caption(int(label)) for label in labels]
    generated = Split(evaluation.generate_images(pipe, prompts, config.seed, config.batch_size, **options), labels)
    used = {"guidance_scale": pipe.guidance_scale, "num_inference_steps": pipe.num_timesteps, **options}
    result = {**used, "generation_seconds": time.perf_counter() - started}
    if config.keep:
        name = f"{Path(config.output).stem}-guidance-{pipe.guidance_scale:g}.npz"
        evaluation.save_images(Path(config.output).with_name(name), generated, prompts)
    result |= evaluation.measure(generated, reference, 0 if config.fast else config.cas_steps)
    if prompts := evaluation.heldout_prompts(bank, labels):
        images = evaluation.generate_images(pipe, prompts, config.seed + len(labels), config.batch_size, **options)
        result["heldout_wording"] = evaluation.measure_wording(Split(images, labels), prompts, reference)
    return result


def load_real(config: EvaluateConfig, split: str, **form: int) -> ImageDataset:
    """Return a split of the real images in the form `resolution`, `channels`."""
    return load_image_dataset(config.dataset_name, split, caption_bank=config.caption_bank or None, **form)


def prepare_reference(config: EvaluateConfig, labels: np.ndarray, size: int, channels: int) -> Reference:
    """Return real images of the size of the evaluated ones, with evaluators trained on them."""
    real = [load_real(config, split, resolution=size, channels=channels) for split in ("train", "test")]
    names = real[0].class_names
    train, test = map(evaluation.as_split, real)
    options = {"flip": config.flip, "device": config.device}
    judges = evaluation.load_evaluators(config.evaluators, train, test, len(names), config.evaluator_steps, **options)
    return evaluation.make_reference(names, train, test, judges, labels, seed=config.seed, **options)


def main(config: EvaluateConfig) -> int:
    """Measure, and write the results anew after every guidance scale."""
    started = time.perf_counter()
    real = load_real(config, "test")
    if real.class_names is None or (config.model and real.bank is None):
        raise ValueError(f"{real.name} has no captions for its classes: name a --caption_bank")
    if config.model:
        pipe, facts = load_pipeline(config.model, config.device)
        bank, size, channels = load_bank(real.bank), pipe.unet.config.sample_size, pipe.unet.config.in_channels
        labels = evaluation.balanced_labels(config.num_images, len(bank.class_names))
    else:
        given = evaluation.read_images(config.images, real.class_names, real.bank)
        labels, size, channels = given.labels, given.images.shape[1], given.images.shape[3]
    reference = prepare_reference(config, labels, size, channels)
    results = {
        **evaluation.environment(),
        "source": config.model or config.images,
        "model_sha256": facts["model_sha256"] if config.model else None,
        "dataset": real.name,
        "split": {"reference": "test", "num_train": len(reference.train.labels), "num_test": len(real)},
        "seed": config.seed,
        "evaluators": evaluation.describe_evaluators(reference),
        "runs": [],
    }
    if not config.fast:
        real_images = evaluation.real_training_images(reference)
        score = evaluation.classification_accuracy_score(real_images, reference, config.cas_steps)
        results["real_training_images"] = {"classification_accuracy_score": score}
    options = {"num_inference_steps": config.num_inference_steps, "guidance_interval": config.guidance_interval}
    options = {name: value for name, value in options.items() if value}
    for scale in [{"guidance_scale": value} for value in config.guidance_scale] or [{}]:
        if config.model:
            results["runs"].append(sample_and_measure(pipe, bank, labels, reference, config, scale | options))
        else:
            results["runs"].append(evaluation.measure(given, reference, 0 if config.fast else config.cas_steps))
        results["wall_clock_seconds"] = time.perf_counter() - started
        evaluation.write_results(results, config.output)
        Path(config.output).with_suffix(".md").write_text(evaluation.render_card_results(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateConfig, {}))
