"""The memorization audit: does a model hand out the images that it was trained on, and can one tell which they were?

Everything is held against real images of the test split, which nobody trained on: a share of near-copies means little
until one knows how many unseen real images would count as copies of a training image, too. Run by `visbio audit`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.config import flag
from visbio_diffusers.data import ImageDataset, load_image_dataset
from visbio_diffusers.evaluation.alignment import plain_captions
from visbio_diffusers.evaluation.benchmark import check_real, warn_of_other_splits
from visbio_diffusers.evaluation.evaluators import SELF_SUPERVISED, find_evaluators
from visbio_diffusers.evaluation.features import ImageEncoder, features, load
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
from visbio_diffusers.evaluation.sampling import draw_on_cores, drawn_by, generate_images, place_order, store_name
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import check_device, load_pipeline


logger = logging.getLogger(__name__)

SHEET_PAIRS = 24


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Look for training images among generated ones, and ask the model which images it was trained on."""

    dataset_name: str = field(metadata={"help": "the set of the training, splits train and test: flag, npz or folder"})
    output: str = field(metadata={"help": "folder for audit.json and the sheet of the closest pairs"})
    caption_bank: str = flag("", "bank of a set that has none of its own: name, or YAML file")
    evaluators: str = flag("", "folder of judges, for their features; default: those shipped for the set, if any")
    model: str = flag("", "folder or Hub id of the pipeline to audit")
    lora: str = flag("", "LoRA adapter to draw with: folder, file or Hub id")
    images: str = flag("", "instead of a model: npz with train_images and train_labels, or a labelled image folder")
    num_images: int = flag(1024, "images to generate, as many of every class")
    num_members: int = flag(1024, "images of either split whose denoising is compared")
    max_train_samples: int = flag(0, "the model was trained on so many images of the train split; 0 is all")
    batch_size: int = flag(64, "images generated at once")
    seed: int = flag(0, "seed of the generated images and of the choice of real ones")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to generate and to compare")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if bool(self.model) == bool(self.images) or (self.lora and not self.model):
            raise ValueError("give either --model, perhaps with --lora, or --images")
        if min(self.num_images, self.batch_size, self.num_members) < 2 or self.max_train_samples < 0:
            raise ValueError("num_images, batch_size and num_members must be at least 2, max_train_samples at least 0")
        if self.seed < 0:
            raise ValueError("seed must be at least 0")


class Looks(NamedTuple):
    """How near a set comes to the training images: distances in pixels and features, correlations, rows that match."""

    distances: np.ndarray
    feature_distances: np.ndarray | None
    correlations: np.ndarray
    rows: np.ndarray


def look(
    images: np.ndarray,
    train: np.ndarray,
    encoder: ImageEncoder | None = None,
    train_features: np.ndarray | None = None,
    device: str = "cpu",
) -> Looks:
    """Compare images `(n, height, width, channels)` with training images, as they are and in disguise."""
    distances, _ = nearest_distances(images, train, device=device)
    by_features = None
    if encoder is not None:
        by_features, _ = nearest_distances(features(encoder, images), train_features, device=device)
    return Looks(distances, by_features, *best_matches(images, train, device=device))


def copy_rates(generated: Looks, unseen: Looks, unseen_weights: np.ndarray) -> dict:
    """Return the shares of near-copies in each look, at matched quantiles of unseen real images."""
    rates = {
        "pixels": near_copies(generated.distances, unseen.distances, unseen_weights),
        "shape": near_copies(1 - generated.correlations, 1 - unseen.correlations, unseen_weights),
    }
    if generated.feature_distances is not None:
        rates["features"] = near_copies(generated.feature_distances, unseen.feature_distances, unseen_weights)
    return rates


def audit(config: AuditConfig) -> int:
    """Write audit.json and sheets of the closest pairs, drawn and unseen, to the folder of `config`, and return 0.

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
    check_device(config.device)
    real = check_real(load_image_dataset(config.dataset_name, "test", caption_bank=bank), bool(config.model))
    pipe = None
    if config.model:
        pipe, facts = load_pipeline(config.model, config.device, lora=config.lora)
        warn_of_other_splits(config.model, config.dataset_name, config.lora)
        labels, prompts, *_ = place_order(real, config.num_images, 0, config.seed)
        request = drawn_by(pipe, facts), prompts, config.seed, config.batch_size
        store = Path(config.output, ".images", store_name(*request))
        settings = {"first_seed": config.seed, "batch_size": config.batch_size, "store": store}
        processes = min(torch.get_num_threads(), 4)
        if pipe.device.type == "cpu" and isinstance(pipe, VisBioPipeline) and processes > 1:
            draw_on_cores((config.model, "cpu", "float32", config.lora), prompts, processes=processes, **settings)
        drawn = generate_images(pipe, prompts, **settings)
        generated, results = Split(drawn.images, labels), results | facts
    else:
        generated = read_images(config.images, real.class_names, real.bank)
    generated = no_larger(generated, real)
    form = {"resolution": generated.images.shape[1], "channels": generated.images.shape[3], "caption_bank": bank}
    trained_on = {"max_samples": config.max_train_samples or None}
    known = load_image_dataset(config.dataset_name, "train", **form, **trained_on)
    unknown = load_image_dataset(config.dataset_name, "test", **form)
    train, test = map(as_split, (known, unknown))
    encoder = find_encoder(config, form)
    train_features = features(encoder, train.images) if encoder else None
    beside = train.images, encoder, train_features, config.device
    found, unseen = (look(split.images, *beside) for split in (generated, test))
    results |= {"seed": config.seed, "n": len(generated.images), "n_unseen": len(test.images)}
    results["near_copies"] = copy_rates(found, unseen, class_weights(test.labels, generated.labels))
    results["membership_inference"] = None  # of images, or of a pipeline whose training loss is not known
    if isinstance(pipe, VisBioPipeline):
        results["membership_inference"] = infer_membership(pipe, known, unknown, config)
    for name, split, looks in (("closest_pairs", generated, found), ("closest_pairs_unseen", test, unseen)):
        save_png(closest_pairs(split.images, train.images, looks), Path(config.output, f"{name}.png"))
    write_results(results, Path(config.output, "audit.json"))
    shutil.rmtree(Path(config.output, ".images"), ignore_errors=True)
    return 0


def find_encoder(config: AuditConfig, form: dict) -> ImageEncoder | None:
    """Return the judge that has learned without labels from the whole train split, None if there is none."""
    folder = config.evaluators
    if not folder:
        found = find_evaluators(as_split(load_image_dataset(config.dataset_name, "train", **form)))
        if found is None:
            logger.info("no judges of these images are shipped: features are left out unless you name --evaluators")
            return None
        folder = found
    return load(Path(folder, SELF_SUPERVISED[0]), config.device)[0]


def infer_membership(pipe, known: ImageDataset, unknown: ImageDataset, config: AuditConfig) -> dict:
    """Return how well the denoising loss tells `known` from `unknown`, with as many of every class on both sides."""
    rng = np.random.default_rng(config.seed)
    train, test = map(as_split, (known, unknown))
    asked = test.labels[rng.permutation(len(test.labels))[: config.num_members]]
    members = match_classes(train.labels, asked, config.seed)
    others = match_classes(test.labels, train.labels[members], config.seed)
    losses = []
    for dataset, split, rows in ((known, train, members), (unknown, test, others)):
        plain = plain_captions(dataset)
        captions = dataset.captions or [plain[label] for label in split.labels]
        prompts = [captions[row] for row in rows]
        losses.append(denoising_losses(pipe, split.images[rows], prompts, seed=config.seed))
    means = {"mean_loss_trained_on": float(losses[0].mean()), "mean_loss_unseen": float(losses[1].mean())}
    return {"auc": membership_auc(*losses), **means}


def closest_pairs(images: np.ndarray, train: np.ndarray, found: Looks) -> Image.Image:
    """Return a sheet of the images most like a training image, each beside that one."""
    pictures, captions = [], []
    for index in np.argsort(-found.correlations)[:SHEET_PAIRS]:
        for kind, array in (("image", images[index]), ("training", train[found.rows[index]])):
            pictures.append(Image.fromarray(array.squeeze()))
            captions.append(f"{kind}, correlation {found.correlations[index]:.3f}")
    return contact_sheet(pictures, captions, columns=8, tile=120, caption_lines=2)
