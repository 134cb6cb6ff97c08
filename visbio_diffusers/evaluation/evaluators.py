"""The judges of an evaluation: which there are, and how they are loaded, or trained when they are not there yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation import features as evaluator_features
from visbio_diffusers.evaluation.alignment import (
    TextFeatures,
    alignment_scores,
    plain_captions,
    text_encoder_hash,
    text_features,
    train_alignment,
)
from visbio_diffusers.evaluation.features import ImageClassifier, ImageEncoder, ImageTextEncoder
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.evaluation.judges import train_classifier, train_encoder


# Two classifiers that share neither seed nor shape: what only one of them sees is not to be believed. The third has
# learned without labels, and sees what no class depends on.
EVALUATORS = {
    "cnn3": {"width": 64, "kernel_size": 3, "seed": 0},
    "cnn5": {"width": 40, "kernel_size": 5, "seed": 1},
    "simclr": {"width": 64, "kernel_size": 3, "seed": 2},
}
SELF_SUPERVISED = ("simclr",)
ALIGNMENT = "clip"
ALIGNMENT_SETTINGS = {"width": 64, "kernel_size": 3, "seed": 3}
LARGE_BATCH = 256  # of the judges that tell the images of a batch apart


@dataclass(frozen=True)
class Evaluator:
    """A network trained on the train split, with its features of the real images.

    Args:
        name (`str`): stands in the name of the distance, FD-`name`.
        model (`ImageEncoder`): in evaluation mode; an `ImageClassifier` can also say what an image shows.
        training (`dict`): how it was trained.
        train_features, test_features (`np.ndarray` of shape `(n, d)`): of the two splits.
    """

    name: str
    model: ImageEncoder
    training: dict
    train_features: np.ndarray
    test_features: np.ndarray

    @classmethod
    def of(cls, name: str, model: ImageEncoder, training: dict, train: Split, test: Split) -> Evaluator:
        """Return an evaluator with the features of both splits."""
        real = (evaluator_features.features(model, split.images) for split in (train, test))
        return cls(name, model, training, *real)

    @property
    def classifies(self) -> bool:
        """Whether it can say what an image shows."""
        return isinstance(self.model, ImageClassifier)


@dataclass(frozen=True)
class Aligner:
    """What says whether an image shows its prompt.

    Args:
        model (`ImageTextEncoder`): in evaluation mode.
        training (`dict`): how it was trained.
        encode: texts -> features, see [`text_features`].
        class_captions (`list[str]`): the plain caption of every class.
    """

    model: ImageTextEncoder
    training: dict
    encode: TextFeatures
    class_captions: list[str]
    name: str = ALIGNMENT

    def __call__(self, split: Split, prompts: list[str] | None = None) -> dict:
        """Return `alignment_scores` of images and their prompts, which are the plain captions if not given."""
        prompts = prompts or [self.class_captions[label] for label in split.labels]
        return alignment_scores(self.model, split.images, split.labels, prompts, self.class_captions, self.encode)


def load_evaluators(
    folder: str | Path,
    train: Split,
    test: Split,
    num_classes: int,
    steps: int,
    *,
    flip: bool = True,
    device: str = "cpu",
    names: Sequence[str] = tuple(EVALUATORS),
) -> list[Evaluator]:
    """Load judges of EVALUATORS from `folder`; those that are not there yet are trained and saved.

    Args:
        folder (`str` or `Path`): one subfolder per judge.
        train, test (`Split`): real images; only `train` is trained on.
        steps (`int`), flip (`bool`): see `train_classifier`; used only where training is needed.
        names (`Sequence[str]`): which of them.

    Raises:
        ValueError: if a judge in the folder was trained on other images.
    """
    digest = images_hash(train)
    evaluators = []
    for name in names:
        path = Path(folder) / name
        if not path.is_dir():
            settings = {**EVALUATORS[name], "flip": flip}
            common = {"device": device, "description": f"training evaluator {name}"}
            if name in SELF_SUPERVISED:
                settings |= {"batch_size": LARGE_BATCH, "steps": _large_batches(steps)}
                model = train_encoder(train.images, **settings, **common)
            else:
                settings["steps"] = steps
                model = train_classifier(train.images, train.labels, num_classes=num_classes, **settings, **common)
            training = {**settings, "train_images": len(train.images), "train_sha256": digest}
            evaluator_features.save(model, path, training)
        evaluators.append(Evaluator.of(name, *load_judge(path, digest, device), train, test))
    return evaluators


def load_aligner(
    folder: str | Path, dataset: ImageDataset, train: Split, steps: int, *, flip: bool = True, device: str = "cpu"
) -> Aligner:
    """Load the judge of images and prompts from `folder`, or train it on a set and its decoded images, and save it.

    Raises:
        ValueError: if the one in the folder was trained on other images.
    """
    path, digest, encode = Path(folder) / ALIGNMENT, images_hash(train), text_features(device)
    encoder_hash = text_encoder_hash()
    if not path.is_dir():
        settings = {**ALIGNMENT_SETTINGS, "flip": flip, "batch_size": LARGE_BATCH, "steps": _large_batches(steps)}
        common = {"device": device, "description": f"training evaluator {ALIGNMENT}"}
        model = train_alignment(dataset, train.images, encode, **settings, **common)
        training = {**settings, "train_images": len(train.images), "train_sha256": digest}
        evaluator_features.save(model, path, training | {"text_encoder_sha256": encoder_hash})
    model, training = load_judge(path, digest, device)
    if training.get("text_encoder_sha256") != encoder_hash:
        raise ValueError(f"{path} was trained with another text encoder: delete the folder, it is trained anew")
    return Aligner(model, training, encode, plain_captions(dataset))


def find_evaluators(train: Split) -> Path | None:
    """Return the folder of the shipped judges that were trained on exactly these images, None if there is none."""
    digest, package = images_hash(train), Path(__file__).parents[1]
    for place in (package, package.parent):
        for config in sorted(place.glob(f"model_cards/evaluators-*/*/{evaluator_features.CONFIG_NAME}")):
            if json.loads(config.read_text())["training"]["train_sha256"] == digest:
                return config.parents[1]
    return None


def images_hash(split: Split) -> str:
    """Return the SHA-256 of images and labels, by which evaluators know what they were trained on."""
    return hashlib.sha256(split.images.tobytes() + split.labels.astype(np.int64).tobytes()).hexdigest()


def load_judge(path: Path, digest: str, device: str) -> tuple[ImageEncoder, dict]:
    """Return a judge and how it was trained.

    Raises:
        ValueError: if that was on images of another hash, or its files are damaged.
    """
    model, training = evaluator_features.load(path, device)
    if training["train_sha256"] != digest:
        raise ValueError(f"{path} was trained on other images: name another --evaluators folder for this set")
    return model, training


def _large_batches(steps: int) -> int:
    """Return the steps of large batches in which as many images are seen as in `steps` of 64."""
    return max(1, steps * 64 // LARGE_BATCH)
