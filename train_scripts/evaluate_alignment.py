"""Measure dual encoders on test images, beside supervised classifiers with the same vision model.

python train_scripts/evaluate_alignment.py --models runs/*/alignment --dataset_name bloodmnist --output align.json
Of several models (trainings from several seeds) each is measured; their mean and spread are in `summary`.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from visbio_diffusers import evaluation
from visbio_diffusers.alignment import DualEncoder, caption_ensembles, classify, load_dual_encoder, measures
from visbio_diffusers.alignment.describe import describe
from visbio_diffusers.alignment.diffusion_classifier import denoising_evidence
from visbio_diffusers.augmentation import vary_photographs
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import ImageDataset, load_image_dataset
from visbio_diffusers.evaluation.features import to_pixel_values
from visbio_diffusers.evaluation.judges import minimise
from visbio_diffusers.load import load_pipeline


@dataclass(frozen=True, kw_only=True)
class EvaluateAlignmentConfig:
    """Measure dual encoders on test images."""

    models: list[str] = field(metadata={"help": "folders or Hub ids of dual encoders"})
    dataset_name: str = field(metadata={"help": "real images, splits train and test: flag, npz or folder"})
    output: str = field(metadata={"help": "JSON file for the results"})
    caption_bank: str = flag("", "bank of a set that has none of its own")
    subtype_dataset_name: str = flag("", "a set of the same bank with a column subtype, whose subtypes are told apart")
    foreign_dataset_name: list[str] = field(
        default_factory=list, metadata={"help": "sets of other things, of which none of the captions is true"}
    )
    supervised_steps: int = flag(0, "optimizer steps of a classifier with the same vision model; 0 leaves it out")
    generator: str = flag("", "pipeline whose denoising classifies, too; empty leaves it out")
    num_generator_images: int = flag(256, "test images for it")
    seed: int = flag(0, "of the choice of those, and of the classifiers")


class Classifier(nn.Module):
    """The vision model of a dual encoder, new, under one linear layer."""

    def __init__(self, encoder: DualEncoder, num_classes: int):
        """Create it with random weights."""
        super().__init__()
        shape = encoder.model.config.vision_config
        self.vision_model, self.head = AutoModel.from_config(shape), nn.Linear(shape.hidden_size, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map images in [-1, 1] to logits `(batch, num_classes)`."""
        return self.head(self.vision_model(pixel_values).pooler_output)


def pixels_of(dataset: ImageDataset) -> np.ndarray:
    """Return all images of a set, uint8 `(n, height, width, channels)`."""
    return np.stack([dataset[i]["image"] for i in range(len(dataset))])


def subtype_labels(dataset: ImageDataset, names: list[str]) -> torch.Tensor:
    """Return the number of each image's subtype, or class without subtypes, among `names`; -1 where it is unknown."""
    subtypes = dataset.subtypes or [None] * len(dataset)
    said = [subtype or dataset.class_names[label] for subtype, label in zip(subtypes, dataset.labels, strict=True)]
    return torch.tensor([names.index(name) if name in names else -1 for name in said])


def train_supervised(
    encoder: DualEncoder, images: np.ndarray, labels: torch.Tensor, steps: int, seed: int
) -> nn.Module:
    """Train the vision model of a dual encoder anew, with labels, on images varied as in its own training."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Classifier(encoder, int(labels.max()) + 1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        turned = to_pixel_values(images[rows.numpy()]).rot90(int(torch.randint(0, 4, ())), (2, 3))
        return F.cross_entropy(model(vary_photographs(turned)), labels[rows])

    minimise(model, loss_of, len(images), steps, 128, generator, "supervised classifier")
    return model


@torch.no_grad()
def scores_of(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return what a model says of images, in pieces of 256."""
    return torch.cat([model(part) for part in pixel_values.split(256)])


def measure(encoder: DualEncoder, config: EvaluateAlignmentConfig, seed: int) -> dict:
    """Return all measures of one dual encoder; classifiers beside it are trained from `seed`."""
    side, bank_name = encoder.resolution, config.caption_bank or None
    test = load_image_dataset(config.dataset_name, "test", resolution=side, caption_bank=bank_name)
    if test.bank is None or test.labels.ndim != 1:
        raise ValueError(f"{test.name} needs a caption bank of one class an image: give --caption_bank")
    bank, labels = load_bank(test.bank), torch.as_tensor(test.labels)
    images = pixels_of(test)
    pixel_values, captions = to_pixel_values(images), list(caption_ensembles(bank).values())
    embeds = encoder.embed_images(images)
    cosines = classify(encoder, embeds, captions)
    found = {"model": encoder.name, "sha256": encoder.sha256}
    found["zero_shot"] = measures.zero_shot(encoder, embeds, labels, bank)
    found["retrieval"] = measures.retrieval(encoder, embeds, labels, bank)
    found["calibration_error"] = measures.calibration_error(encoder, cosines, labels)
    rows = measures.class_embeds(encoder, captions).T
    found["robustness"] = measures.robustness(
        lambda changed: encoder.project(scores_of(partial(pooled, encoder), changed)) @ rows, pixel_values, labels
    )
    found["none_of_these"] = {"test": none_of_these(encoder, images, captions)}
    for name in config.foreign_dataset_name:
        foreign = load_image_dataset(name, "test", resolution=side, channels=3)
        found["none_of_these"][foreign.name] = none_of_these(encoder, pixels_of(foreign), captions)
    if config.supervised_steps:
        train = load_image_dataset(config.dataset_name, "train", resolution=side, caption_bank=bank_name)
        model = train_supervised(
            encoder, pixels_of(train), torch.as_tensor(train.labels), config.supervised_steps, seed
        )
        found["supervised"] = measures.right(scores_of(model, pixel_values), labels)
        found["supervised_robustness"] = measures.robustness(partial(scores_of, model), pixel_values, labels)
    if config.subtype_dataset_name:
        found["subtypes"] = measure_subtypes(encoder, config, test.bank, seed)
    return found


def none_of_these(encoder: DualEncoder, images: np.ndarray, captions: list[list[str]]) -> dict:
    """Return the share of images to which no caption is said to fit."""
    said = describe(encoder, encoder.features(images), captions)
    return evaluation.proportion_interval(sum(bool(each.doubt) for each in said), len(said))


def pooled(encoder: DualEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the pooled features of what the processor makes of images."""
    return encoder.model.vision_model(pixel_values=pixel_values.to(encoder.model.device)).pooler_output.cpu()


def measure_subtypes(encoder: DualEncoder, config: EvaluateAlignmentConfig, bank_name: str, seed: int) -> dict:
    """Return zero-shot and supervised accuracy over the subtypes of a bank."""
    captions = caption_ensembles(load_bank(bank_name), subtypes=True)
    sets = {}
    for split in ("train", "test"):
        dataset = load_image_dataset(
            config.subtype_dataset_name, split, resolution=encoder.resolution, caption_bank=bank_name
        )
        labels = subtype_labels(dataset, list(captions))
        sets[split] = pixels_of(dataset)[(labels >= 0).numpy()], labels[labels >= 0]
    images, labels = sets["test"]
    cosines = classify(encoder, encoder.embed_images(images), list(captions.values()))
    found = {"names": list(captions), "zero_shot": measures.right(cosines, labels)}
    if config.supervised_steps:
        model = train_supervised(encoder, *sets["train"], config.supervised_steps, seed)
        found["supervised"] = measures.right(scores_of(model, to_pixel_values(images)), labels)
    return found


def measure_generator(config: EvaluateAlignmentConfig, encoder: DualEncoder) -> dict:
    """Return the accuracy of the diffusion classifier, and of the dual encoder on the same images."""
    pipe, facts = load_pipeline(config.generator)
    side = pipe.unet.config.sample_size
    test = load_image_dataset(config.dataset_name, "test", resolution=side, caption_bank=config.caption_bank or None)
    chosen = test.select(np.random.default_rng(config.seed).permutation(len(test))[: config.num_generator_images])
    bank, labels, images = load_bank(test.bank), torch.as_tensor(chosen.labels), pixels_of(chosen)
    plain = [bank.plain_caption(k) for k in range(len(bank.class_names))]
    evidence = denoising_evidence(pipe, to_pixel_values(images), plain, seed=config.seed)
    cosines = classify(encoder, encoder.embed_images(images), list(caption_ensembles(bank).values()))
    agree = evidence.argmin(dim=1) == cosines.argmax(dim=1)
    return {
        "model": facts["model"], "model_sha256": facts["model_sha256"], "accuracy": measures.right(-evidence, labels),
        "dual_encoder": measures.right(cosines, labels),
        "agree": evaluation.proportion_interval(int(agree.sum()), len(labels)),
        "right_where_they_agree": measures.right(cosines[agree], labels[agree]),
    }  # fmt: skip


def summary(found: list[dict]) -> dict:
    """Return mean and standard deviation over the models of every value, by its path."""
    values: dict[str, list[float]] = {}

    def collect(entry, path: str) -> None:
        if isinstance(entry, dict) and "value" in entry:
            values.setdefault(path, []).append(entry["value"])
        elif isinstance(entry, dict):
            for name, inner in entry.items():
                collect(inner, f"{path}/{name}" if path else name)
        elif isinstance(entry, float):
            values.setdefault(path, []).append(entry)

    for each in found:
        collect(each, "")
    return {
        path: {
            "mean": float(np.mean(each)),
            "spread": float(np.std(each, ddof=1)) if len(each) > 1 else None,
            "n": len(each),
        }
        for path, each in values.items()
    }


def main(config: EvaluateAlignmentConfig) -> int:
    """Measure each model, writing the results after each."""
    results = {**evaluation.environment(), "dataset": Path(config.dataset_name).stem, "split": "test", "models": []}
    encoders = [load_dual_encoder(name) for name in config.models]
    for seed, encoder in enumerate(encoders, config.seed):
        results["models"].append(measure(encoder, config, seed))
        results["summary"] = summary(results["models"])
        evaluation.write_results(results, config.output)
    if config.generator:
        results["diffusion_classifier"] = measure_generator(config, encoders[0])
        evaluation.write_results(results, config.output)
    for path, entry in results["summary"].items():
        sys.stdout.write(f"{path}: {entry['mean']:.3f}\n")
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateAlignmentConfig, {}))
