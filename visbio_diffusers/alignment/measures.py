"""What a dual encoder is worth: zero-shot accuracy in several wordings, retrieval, calibration, robustness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from visbio_diffusers.alignment.dual_encoder import DualEncoder
from visbio_diffusers.alignment.zero_shot import caption_ensembles, class_embeds
from visbio_diffusers.augmentation import blur, rescale, vary_stain
from visbio_diffusers.captions import CaptionBank
from visbio_diffusers.evaluation.metrics import proportion_interval


FRESH_SEED = 10_000  # of training-style captions that no training with a smaller seed has drawn first
CAPTIONS = 24  # of each class, one classifier for each place in the lists
Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: dict[str, Change] = {
    "none": lambda images: images,
    "stain and light, half as strong as in training": partial(vary_stain, strength=0.5),
    "stain and light, as strong as in training": vary_stain,
    "stain and light, half as strong again": partial(vary_stain, strength=1.5),
    "blur of one pixel": lambda images: blur(images, torch.ones(len(images))),
    "stored at three quarters of the side": partial(rescale, factor=0.75),
    "stored at half of the side": partial(rescale, factor=0.5),
}


def right(cosines: torch.Tensor, labels: torch.Tensor) -> dict:
    """Return the share of rows of `cosines` `(n, classes)` that are highest at their label, with its interval."""
    return proportion_interval(int((cosines.argmax(dim=1) == labels).sum()), len(labels))


def zero_shot(encoder: DualEncoder, embeds: torch.Tensor, labels: torch.Tensor, bank: CaptionBank) -> dict:
    """Return the accuracy on labelled images with each kind of wording.

    Args:
        encoder (`DualEncoder`): embeds the captions.
        embeds (`torch.Tensor` of shape `(n, width)`), labels (`(n,)`): the images and their classes in the bank.
        bank (`CaptionBank`): of the classes.

    Returns:
        accuracies `dict(value, low, high, n)`: `plain`, `ensemble` (64 captions of each class), `training_style` and
        `heldout` (one caption of each class, the mean of up to 24 such choices: fresh captions as in training, and
        held-out descriptions in held-out templates), and `heldout_ensemble`.
    """
    numbers = range(len(bank.class_names))
    fresh = [bank.pool(k, CAPTIONS, FRESH_SEED, subtype=bank.class_names[k]) for k in numbers]
    heldout = [bank.heldout_captions(k) for k in numbers]
    wordings = {
        "plain": [[bank.plain_caption(k)] for k in numbers],
        "ensemble": list(caption_ensembles(bank).values()),
        "heldout_ensemble": heldout,
    }
    found = {
        name: right(embeds @ class_embeds(encoder, each).T, labels) for name, each in wordings.items() if all(each)
    }
    for name, captions in (("training_style", fresh), ("heldout", heldout)):
        if all(captions):
            found[name] = _one_caption_each(encoder, embeds, labels, captions)
    return found


def _one_caption_each(encoder: DualEncoder, embeds, labels, captions: Sequence[Sequence[str]]) -> dict:
    """Return the mean accuracy of classifiers of one caption of each class; its interval is that of the choice."""
    count = min(CAPTIONS, *map(len, captions))
    rows = torch.stack([encoder.embed_texts(each[:count]) for each in captions])  # (classes, count, width)
    shares = np.array([float(((embeds @ rows[:, i].T).argmax(dim=1) == labels).float().mean()) for i in range(count)])
    half = 1.96 * shares.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    value = float(shares.mean())
    return {"value": value, "low": float(value - half), "high": float(value + half), "n": count}


def retrieval(encoder: DualEncoder, embeds: torch.Tensor, labels: torch.Tensor, bank: CaptionBank) -> dict:
    """Return the shares of nearest neighbours of the right class, in both directions, beside chance.

    `image_to_text`: of an image, among 24 fresh captions of each class; `text_to_image`: of such a caption, among the
    images, the nearest and the ten nearest. Chance is that of a random neighbour.
    """
    numbers = range(len(bank.class_names))
    captions = [bank.pool(k, CAPTIONS, FRESH_SEED, subtype=bank.class_names[k]) for k in numbers]
    meant = torch.tensor([k for k in numbers for _ in captions[k]])
    cosines = embeds @ encoder.embed_texts([text for each in captions for text in each]).T  # (images, captions)
    nearest = meant[cosines.argmax(dim=1)]
    ten = labels[cosines.T.topk(min(10, len(labels)), dim=1).indices] == meant[:, None]
    shares = torch.bincount(labels, minlength=len(captions)) / len(labels)
    return {
        "image_to_text": proportion_interval(int((nearest == labels).sum()), len(labels)),
        "image_to_text_chance": 1 / len(captions),
        "text_to_image": proportion_interval(int(ten[:, 0].sum()), len(meant)),
        "text_to_image_ten": float(ten.float().mean()),
        "text_to_image_chance": float(shares[meant].mean()),
    }


def calibration_error(encoder: DualEncoder, cosines: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, in bins of confidence.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    confidence, answer = (cosines * encoder.calibration.scale).softmax(dim=1).max(dim=1)
    correct = (answer == labels).float()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(confidence - correct)[place == b].sum().abs() for b in place.unique()]
    return float(sum(gaps) / len(labels))


def robustness(
    answer: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, labels: torch.Tensor
) -> dict:
    """Return the accuracy on changed images, by the name of the change.

    Args:
        answer (`Callable`): from pixel values to scores `(n, classes)`.
        pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`): in [-1, 1].
        labels (`torch.Tensor` of shape `(n,)`): right classes.
    """
    found = {}
    for name, change in CHANGES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found[name] = right(answer(change(pixel_values)), labels)
    return found


def render_alignment(results: dict) -> str:
    """Return the results of train_scripts/evaluate_alignment.py as Markdown tables."""
    summary, count = results["summary"], len(results["models"])
    rows = [
        ("Right class, plain captions", "zero_shot/plain", "supervised"),
        ("Right class, 64 captions of each", "zero_shot/ensemble", ""),
        ("Right class, one fresh caption of each as in training", "zero_shot/training_style", ""),
        ("Right class, one held-out description of each", "zero_shot/heldout", ""),
        ("Right class, all held-out descriptions", "zero_shot/heldout_ensemble", ""),
        ("Right among classes and subtypes", "subtypes/zero_shot", "subtypes/supervised"),
        ("Image to text: the nearest fresh caption is of its class", "retrieval/image_to_text", ""),
        ("by chance", "retrieval/image_to_text_chance", ""),
        ("Text to image: the nearest image is of its class", "retrieval/text_to_image", ""),
        ("Text to image: of the ten nearest", "retrieval/text_to_image_ten", ""),
        ("by chance", "retrieval/text_to_image_chance", ""),
        ("Expected calibration error", "calibration_error", ""),
    ]
    changes = [(f"Right class, {name}", f"robustness/{name}", f"supervised_robustness/{name}") for name in CHANGES]
    paths = [path for path in summary if path.startswith("none_of_these/")]
    rows += [*changes[1:], *((f"None of these, of {path.split('/')[1]}", path, "") for path in paths)]
    table = [f"| Mean of {count} trainings (standard deviation) | Without labels | Supervised, same vision model |"]
    table.append("| --- | --- | --- |")
    table += [f"| {title} | {_cell(summary, path)} | {_cell(summary, beside)} |" for title, path, beside in rows]
    lines = [*table, "", f"Of all test images of {results['dataset']}; `{results['command']}`"]
    second = results.get("diffusion_classifier")
    if second:
        shares = {name: second[name] for name in ("accuracy", "dual_encoder", "agree", "right_where_they_agree")}
        said = {
            name: f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})" for name, each in shares.items()
        }
        lines += [
            "",
            f"On {second['accuracy']['n']} of them the generator {second['model']} is right by denoising in "
            f"{said['accuracy']}, the dual encoder in {said['dual_encoder']}; they agree on {said['agree']}, and are "
            f"then right in {said['right_where_they_agree']}.",
        ]
    return "\n".join(lines) + "\n"


def _cell(summary: dict, path: str) -> str:
    entry = summary.get(path)
    if entry is None:
        return "-"
    spread = "" if entry["spread"] is None else f" ({entry['spread']:.3f})"
    return f"{entry['mean']:.3f}{spread}"
