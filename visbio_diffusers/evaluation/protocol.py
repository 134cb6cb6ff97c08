"""The evaluation of labelled images against one real set: what is measured, with what, and beside what."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from visbio_diffusers.evaluation import features as evaluator_features
from visbio_diffusers.evaluation.evaluators import Aligner, Evaluator
from visbio_diffusers.evaluation.features import predictions, weights_hash
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.evaluation.judges import train_classifier
from visbio_diffusers.evaluation.memorization import near_copies, nearest_distances
from visbio_diffusers.evaluation.metrics import (
    class_weights,
    cluster_interval,
    fidelity,
    frechet_with_floor,
    proportion_interval,
    within_class_distance,
)
from visbio_diffusers.evaluation.neighbours import kernel_distance_with_interval, manifold_measures_with_intervals


logger = logging.getLogger(__name__)

FLOOR_DRAWS = 20  # one draw of 1,024 real images gives a Frechet distance between a third and twice the mean


@dataclass(frozen=True)
class Reference:
    """Everything real that evaluated images are held against; made once for any number of evaluated sets.

    Args:
        class_names (`tuple` of `str`): in the order of the labels.
        train, test (`Split`): real images; test ones were seen by no model and no evaluator.
        matched (`list` of `np.ndarray`): draws of rows of `train`, each with as many images of every class as the
            evaluated set has. All make the floor of the distance; the first one stands for real images elsewhere.
        common (`np.ndarray`): class indices, of every class as many as all three sets have: evaluated, train, test.
            Measures that cannot weigh images take so many of each.
        matched_test (`np.ndarray`): rows of `test` with the classes `common`.
        weights (`np.ndarray`): of the test images, bringing them to the class shares of the evaluated set.
        evaluators (`list` of `Evaluator`): the judges.
        test_distances (`np.ndarray`): from every test image to its nearest training image, in [0, 1] pixels.
        flip (`bool`): see `augment`; for classifiers trained on the evaluated images.
        seed (`int`): of the bootstrap and of those classifiers.
        device (`str`): where the classifiers run.
    """

    class_names: tuple[str, ...]
    train: Split
    test: Split
    matched: list[np.ndarray]
    common: np.ndarray
    matched_test: np.ndarray
    weights: np.ndarray
    evaluators: list[Evaluator]
    test_distances: np.ndarray
    flip: bool
    seed: int
    device: str


def match_classes(labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Draw rows of `labels` with as many of every class as `wanted` has, or all where there are fewer."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(*np.unique(wanted, return_counts=True), strict=True)
    ]
    return np.sort(np.concatenate(rows))


def make_reference(
    class_names: tuple[str, ...],
    train: Split,
    test: Split,
    evaluators: list[Evaluator],
    labels: np.ndarray,
    *,
    flip: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Reference:
    """Prepare the real side of an evaluation of images with the class indices `labels` `(n,)`.

    Raises:
        ValueError: if a class among `labels` has no real images.
    """
    class_weights(train.labels, labels)
    size = len(class_names)
    wanted, trained, tested = (np.bincount(rows, minlength=size) for rows in (labels, train.labels, test.labels))
    for k in np.flatnonzero(wanted > np.minimum(trained, tested)):
        logger.warning(
            f"{class_names[k]}: {wanted[k]} images, but {trained[k]} to train on and {tested[k]} to test on"
        )
    common = np.repeat(np.arange(size), np.minimum(wanted, np.minimum(trained, tested)))
    return Reference(
        class_names=class_names,
        train=train,
        test=test,
        matched=[match_classes(train.labels, labels, seed + draw) for draw in range(FLOOR_DRAWS)],
        common=common,
        matched_test=match_classes(test.labels, common, seed),
        weights=class_weights(test.labels, labels),
        evaluators=evaluators,
        test_distances=nearest_distances(test.images, train.images, device=device)[0],
        flip=flip,
        seed=seed,
        device=device,
    )


def describe_evaluators(reference: Reference) -> list[dict]:
    """Return name, hash, size and accuracy on real test images of every judge."""
    return [
        {
            **_describe(judge),
            "class_names": list(reference.class_names) if judge.classifies else None,
            "real_test": _real_fidelity(judge, reference) if judge.classifies else None,
        }
        for judge in reference.evaluators
    ]


def _real_fidelity(judge: Evaluator, reference: Reference) -> dict:
    rows = reference.matched_test
    return fidelity(
        predictions(judge.model, judge.test_features[rows]), reference.test.labels[rows], reference.class_names
    )


def describe_aligner(aligner: Aligner, reference: Reference, captions: list[str] | None = None) -> dict:
    """Return hash, size and scores on real test images, with `captions` of their own or those of their classes."""
    rows = reference.matched_test
    real = Split(reference.test.images[rows], reference.test.labels[rows])
    return {**_describe(aligner), "real_test": aligner(real, captions and [captions[row] for row in rows])}


def _describe(judge: Evaluator | Aligner) -> dict:
    return {
        "name": judge.name,
        "sha256": weights_hash(judge.model),
        "parameters": sum(parameter.numel() for parameter in judge.model.parameters()),
        "model": judge.model.config,
        "training": judge.training,
    }


def measure(generated: Split, reference: Reference, cas_steps: int = 0) -> dict:
    """Measure fidelity, diversity, Frechet distance, copies and use of images with the classes `generated.labels`.

    Args:
        cas_steps (`int`): optimizer steps of `classification_accuracy_score`; 0 leaves it out.

    Returns:
        `near_copies_pixels` (which sees smooth images nearer than they are: compare it with the features), and under
        `evaluators` for each judge: `within_class_distance`; `frechet` to the real test images, with the class shares
        of the evaluated ones, and its floor from training images; `kernel_distance` and `manifold` (precision, recall,
        density, coverage) to real test images, each beside that of real training images; `near_copies` in features.
        Of classifiers also `fidelity`, and `recognised_within_class_distance`, since images of wrong classes are far
        from the others.
    """
    distances, _ = nearest_distances(generated.images, reference.train.images, device=reference.device)
    result = {
        "n": len(generated.images),
        "near_copies_pixels": near_copies(distances, reference.test_distances, reference.weights),
        "evaluators": {judge.name: _judged(generated, reference, judge) for judge in reference.evaluators},
    }
    if cas_steps:
        result["classification_accuracy_score"] = classification_accuracy_score(generated, reference, cas_steps)
    return result


def _judged(generated: Split, reference: Reference, judge: Evaluator) -> dict:
    seed, labels = reference.seed, generated.labels
    features = evaluator_features.features(judge.model, generated.images)
    draws = [(judge.train_features[rows], reference.train.labels[rows]) for rows in reference.matched]
    real, real_labels = draws[0]
    floors = [(rows, class_weights(row_labels, labels)) for rows, row_labels in draws]
    real_rows = match_classes(reference.train.labels, reference.common, seed)
    sets = {
        "generated": features[match_classes(labels, reference.common, seed)],
        "real": judge.train_features[real_rows],
    }
    test_rows = judge.test_features[reference.matched_test]
    test_distances, _ = nearest_distances(judge.test_features, judge.train_features, device=reference.device)
    distances, _ = nearest_distances(features, judge.train_features, device=reference.device)
    pair = features, labels, real, real_labels
    return {
        **(_recognised(*pair, reference, judge) if judge.classifies else {}),
        "within_class_distance": within_class_distance(*pair, reference.class_names, seed=seed),
        "frechet": frechet_with_floor(features, floors, judge.test_features, reference.weights, seed=seed),
        "kernel_distance": {
            kind: kernel_distance_with_interval(rows, test_rows, seed=seed) for kind, rows in sets.items()
        },
        "manifold": {
            kind: manifold_measures_with_intervals(rows, test_rows, seed=seed) for kind, rows in sets.items()
        },
        "near_copies": near_copies(distances, test_distances, reference.weights),
    }


def _recognised(
    features: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    reference: Reference,
    judge: Evaluator,
) -> dict:
    """Return what only a classifier can say: which images show their class, and how these alone vary."""
    names, answers = reference.class_names, predictions(judge.model, features)
    right, real_right = answers == labels, predictions(judge.model, real) == real_labels
    among = features[right], labels[right], real[real_right], real_labels[real_right]
    return {
        "fidelity": fidelity(answers, labels, names),
        "recognised_within_class_distance": within_class_distance(*among, names, seed=reference.seed),
    }


def measure_wording(generated: Split, prompts: list[str], reference: Reference) -> dict:
    """Measure how many images of each prompt are recognised as its class, per judge; `prompts` has one per image.

    The interval of the whole is that of new prompts, not only of new images of these.
    """
    wordings = np.array(prompts)
    result = {}
    for judge in filter(lambda judge: judge.classifies, reference.evaluators):
        answers = predictions(judge.model, evaluator_features.features(judge.model, generated.images))
        hits = answers == generated.labels
        measured = fidelity(answers, generated.labels, reference.class_names)
        measured["overall"] |= cluster_interval(hits, prompts, seed=reference.seed)
        result[judge.name] = {
            **measured,
            "per_prompt": {
                prompt: proportion_interval(int(hits[wordings == prompt].sum()), int((wordings == prompt).sum()))
                for prompt in dict.fromkeys(prompts)
            },
        }
    return result


def classification_accuracy_score(training: Split, reference: Reference, steps: int) -> dict:
    """Return the accuracy on real test images of a classifier trained on `training` alone.

    The interval is that of the test images; another seed of the training moves the value, too. `seconds` is what it
    took.

    Source: Ravuri and Vinyals 2019, Classification Accuracy Score for Conditional Generative Models.
    """
    started = time.perf_counter()
    model = train_classifier(
        training.images,
        training.labels,
        num_classes=len(reference.class_names),
        steps=steps,
        seed=reference.seed,
        flip=reference.flip,
        device=reference.device,
        description=f"classifier on {len(training.images)} images",
    )
    answers = predictions(model, evaluator_features.features(model, reference.test.images))
    hits = int((answers == reference.test.labels).sum())
    facts = {"num_training_images": len(training.images), "steps": steps, "seconds": time.perf_counter() - started}
    return proportion_interval(hits, len(answers)) | facts


def real_training_images(reference: Reference) -> Split:
    """Return the real training images that stand beside the evaluated ones."""
    return Split(reference.train.images[reference.matched[0]], reference.train.labels[reference.matched[0]])
