"""The memorization audit: does a model hand out the images that it was trained on, and can one tell which they were?

Everything is held against real images of the test split, which nobody trained on: a share of near-copies means little
until one knows how many unseen real images would count as copies of a training image, too. Run by `visbio audit`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation.images import Split, as_split, no_larger, read_images
from visbio_diffusers.evaluation.memorization import (
    best_matches,
    denoising_losses,
    membership_auc,
    near_copies,
    nearest_distances,
)
from visbio_diffusers.evaluation.metrics import class_weights
from visbio_diffusers.evaluation.protocol import match_classes
from visbio_diffusers.evaluation.report import environment, write_results
from visbio_diffusers.evaluation.sampling import balanced_labels, generate_images, store_name
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import load_pipeline


SHEET_PAIRS = 24


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Look for training images among generated ones, and ask the model which images it was trained on."""

    dataset_name: str = field(metadata={"help": "the set of the training, splits train and test: flag, npz or folder"})
    output: str = field(metadata={"help": "folder for audit.json and the sheet of the closest pairs"})
    caption_bank: str = flag("", "bank of a set that has none of its own: name, or YAML file")
    model: str = flag("", "folder or Hub id of the pipeline to audit")
    images: str = flag("", "instead of a model: npz with train_images and train_labels, or a labelled image folder")
    num_images: int = flag(1024, "images to generate, as many of every class")
    num_members: int = flag(1024, "images of either split whose denoising is compared")
    max_train_samples: int = flag(0, "the model was trained on so many images of the train split; 0 is all")
    batch_size: int = flag(64, "images generated at once")
    seed: int = flag(0, "seed of the generated images and of the choice of real ones")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to generate and to compare")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if bool(self.model) == bool(self.images):
            raise ValueError("give either --model or --images")
        if min(self.num_images, self.batch_size, self.num_members) < 2 or self.max_train_samples < 0:
            raise ValueError("num_images, batch_size and num_members must be at least 2, max_train_samples at least 0")


class Looks(NamedTuple):
    """How near a set comes to the training images: pixel distances, shape correlations, and the rows that match."""

    distances: np.ndarray
    correlations: np.ndarray
    rows: np.ndarray


def look(images: np.ndarray, train: np.ndarray, device: str = "cpu") -> Looks:
    """Compare images `(n, height, width, channels)` with training images, as they are and in disguise."""
    distances, _ = nearest_distances(images, train, device=device)
    return Looks(distances, *best_matches(images, train, device=device))


def copy_rates(generated: Looks, unseen: Looks, unseen_weights: np.ndarray) -> dict:
    """Return the shares of near-copies in pixels and in shape, each at matched quantiles of unseen real images."""
    return {
        "pixels": near_copies(generated.distances, unseen.distances, unseen_weights),
        "shape": near_copies(1 - generated.correlations, 1 - unseen.correlations, unseen_weights),
    }


def audit(config: AuditConfig) -> int:
    """Write audit.json and closest_pairs.png to the folder of `config`, and return 0.

    Raises:
        ValueError: for settings, images or models that cannot be audited; the message names the way out.
        OSError: if something cannot be read or written.
    """
    results: dict[str, Any] = {
        **environment(),
        "source": config.model or config.images,
        "dataset": config.dataset_name,
    }
    bank = config.caption_bank or None
    real = load_image_dataset(config.dataset_name, "test", caption_bank=bank)
    if real.class_names is None:
        raise ValueError(f"{real.name} has no classes: name a --caption_bank")
    pipe = None
    if config.model:
        pipe, facts = load_pipeline(config.model, config.device)
        words = load_bank(real.bank)
        labels = balanced_labels(config.num_images, len(words.class_names))
        prompts = [words.plain_caption(int(label)) for label in labels]
        store = Path(config.output, ".images")
        request = store_name(facts, prompts, config.seed, config.batch_size)
        drawn = generate_images(pipe, prompts, config.seed, config.batch_size, store=store / request)
        generated, results = Split(drawn.images, labels), results | facts
    else:
        generated = read_images(config.images, real.class_names, real.bank)
    generated = no_larger(generated, real)
    form = {"resolution": generated.images.shape[1], "channels": generated.images.shape[3], "caption_bank": bank}
    trained_on = {"max_samples": config.max_train_samples or None}
    train = as_split(load_image_dataset(config.dataset_name, "train", **form, **trained_on))
    test = as_split(load_image_dataset(config.dataset_name, "test", **form))
    found, unseen = (look(split.images, train.images, config.device) for split in (generated, test))
    results |= {"seed": config.seed, "n": len(generated.images), "n_unseen": len(test.images)}
    results["near_copies"] = copy_rates(found, unseen, class_weights(test.labels, generated.labels))
    if isinstance(pipe, VisBioPipeline):
        results["membership_inference"] = infer_membership(pipe, words, train, test, config)
    save_png(closest_pairs(generated.images, train.images, found), Path(config.output, "closest_pairs.png"))
    write_results(results, Path(config.output, "audit.json"))
    shutil.rmtree(Path(config.output, ".images"), ignore_errors=True)
    return 0


def infer_membership(pipe, bank, train: Split, test: Split, config: AuditConfig) -> dict:
    """Return how well the denoising loss tells `train` from `test`, with as many of every class on both sides."""
    rng = np.random.default_rng(config.seed)
    others = rng.permutation(len(test.labels))[: config.num_members]
    members = match_classes(train.labels, test.labels[others], config.seed)
    losses = []
    for split, rows in ((train, members), (test, others)):
        prompts = [bank.plain_caption(int(label)) for label in split.labels[rows]]
        losses.append(denoising_losses(pipe, split.images[rows], prompts, seed=config.seed))
    means = {"mean_loss_trained_on": float(losses[0].mean()), "mean_loss_unseen": float(losses[1].mean())}
    return {"auc": membership_auc(*losses), **means}


def closest_pairs(images: np.ndarray, train: np.ndarray, found: Looks) -> Image.Image:
    """Return a sheet of the generated images most like a training image, each beside that one."""
    pictures, captions = [], []
    for index in np.argsort(-found.correlations)[:SHEET_PAIRS]:
        for kind, array in (("generated", images[index]), ("training", train[found.rows[index]])):
            pictures.append(Image.fromarray(array.squeeze()))
            captions.append(f"{kind}, correlation {found.correlations[index]:.3f}")
    return contact_sheet(pictures, captions, columns=8, tile=120, caption_lines=2)
