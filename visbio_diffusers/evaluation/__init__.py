"""Measures of a text-to-image model of labelled images: fidelity, diversity, distance to real, copies, usefulness."""

from visbio_diffusers.evaluation.evaluators import EVALUATORS, Evaluator, load_aligner, load_evaluators
from visbio_diffusers.evaluation.features import ImageClassifier, ImageEncoder, weights_hash
from visbio_diffusers.evaluation.images import Split, as_split, read_images, save_images
from visbio_diffusers.evaluation.judges import train_classifier, train_encoder
from visbio_diffusers.evaluation.metrics import proportion_interval
from visbio_diffusers.evaluation.protocol import (
    Reference,
    classification_accuracy_score,
    describe_evaluators,
    make_reference,
    measure,
    measure_wording,
    real_training_images,
)
from visbio_diffusers.evaluation.report import environment, render_card_results, write_results
from visbio_diffusers.evaluation.sampling import balanced_labels, generate_images, heldout_prompts, store_name


__all__ = [
    "EVALUATORS",
    "Evaluator",
    "ImageClassifier",
    "ImageEncoder",
    "Reference",
    "Split",
    "as_split",
    "balanced_labels",
    "classification_accuracy_score",
    "describe_evaluators",
    "environment",
    "generate_images",
    "heldout_prompts",
    "load_aligner",
    "load_evaluators",
    "make_reference",
    "measure",
    "measure_wording",
    "proportion_interval",
    "read_images",
    "real_training_images",
    "render_card_results",
    "save_images",
    "store_name",
    "train_classifier",
    "train_encoder",
    "weights_hash",
    "write_results",
]
