"""How many nuclei an image shows, measured in two ways that share nothing: a trained network, and a threshold.

And whether that is as many as were asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation.evaluators import images_hash, load_judge
from visbio_diffusers.evaluation.features import ImageClassifier, to_pixel_values
from visbio_diffusers.evaluation.images import Split, as_split
from visbio_diffusers.evaluation.judges import augment, minimise


COUNTER = {"width": 24, "kernel_size": 5, "seed": 21}  # so that one feature sees almost all of 64 pixels
MIN_AREA = 0.01  # share of the image below which a part is no nucleus, as in captions
SEED_DISTANCE = 0.06  # of the image's side, between the centres of two nuclei
COMMON = 5  # tiles that a count must have to be asked for
DRAWS = 200  # of the bootstrap
COLOURS = {"real": (90, 90, 90), "generated": (200, 60, 30)}


def counted(dataset: ImageDataset) -> Split:
    """Return the images of a set, each with the number of objects in its masks, which its caption says, as its label.

    Raises:
        ValueError: if the set has no masks.
    """
    if dataset.masks is None:
        raise ValueError(f"{dataset.name} has no masks to count in: give photographs with masks in Cellpose's layout")
    return Split(as_split(dataset).images, np.array([int(np.max(mask)) for mask in dataset.masks]))


def train_counter(
    images: np.ndarray, counts: np.ndarray, *, steps: int, device: str = "cpu", batch_size: int = 64
) -> ImageClassifier:
    """Train a network of one answer, from which [`count_by_network`] reads; equal arguments give equal weights.

    The count is a softplus of a linear layer on the mean of a feature map, so that parts of the image add up; the loss
    is the Poisson likelihood.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        counts (`np.ndarray` of shape `(n,)`): objects in each.
        steps (`int`): optimizer steps.
    """
    settings = dict(COUNTER)
    generator = torch.Generator().manual_seed(settings["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.pop("seed"))
        model = ImageClassifier(1, images.shape[3], **settings)
    targets = torch.as_tensor(counts, dtype=torch.float32)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixel_values = augment(to_pixel_values(images[rows.numpy()], device), generator)
        found = F.softplus(model(pixel_values)[:, 0])
        return F.poisson_nll_loss(found, targets[rows].to(device), log_input=False)

    minimise(model.to(device), loss_of, len(images), steps, batch_size, generator, "training the counter")
    return model


def load_counter(folder: str | Path, train: Split, steps: int, device: str = "cpu") -> ImageClassifier:
    """Load the network from `folder`; if it is not there yet, train it and save it.

    Args:
        folder (`str` or `Path`): its own, `counter`, is in this one.
        train (`Split`): images, whose labels are counts.
        steps (`int`): see [`train_counter`]; used only where training is needed.

    Raises:
        ValueError: if the one in the folder was trained on other images.
    """
    path = Path(folder) / "counter"
    if not path.is_dir():
        training = {**COUNTER, "steps": steps, "train_images": len(train.images), "train_sha256": images_hash(train)}
        networks.save(train_counter(train.images, train.labels, steps=steps, device=device), path, training)
    return load_judge(path, images_hash(train), device)[0]


@torch.no_grad()
def count_by_network(model: ImageClassifier, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Return the expected number of nuclei in uint8 images `(n, height, width, channels)`, float `(n,)`."""
    found = torch.as_tensor(networks.features(model, images, batch_size), device=model.head.weight.device)
    return F.softplus(model.head(found)[:, 0]).cpu().numpy()


def count_by_watershed(images: np.ndarray, fluorescent: np.ndarray) -> np.ndarray:
    """Return the number of nuclei by Otsu's threshold, cut apart by a watershed of the distance to the background.

    Nuclei are bright in fluorescence; elsewhere they are what absorbs red, as haematoxylin does.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        fluorescent (`np.ndarray` of shape `(n,)`): bool; of generated images, what was asked for.

    Returns:
        int `(n,)`.

    Source: scikit-image's `threshold_otsu`, `peak_local_max` and `watershed`.
    """
    return np.array([_watershed(image, each) for image, each in zip(images, fluorescent)])


def _watershed(image: np.ndarray, fluorescent: bool) -> int:
    from scipy.ndimage import distance_transform_edt  # of an extra
    from skimage.feature import peak_local_max
    from skimage.filters import gaussian, threshold_otsu
    from skimage.measure import label
    from skimage.segmentation import watershed

    side = image.shape[0]
    strength = image.mean(axis=2) if fluorescent else 255.0 - image[:, :, 0]
    strength = gaussian(strength, side / 64, preserve_range=True)
    mask = strength > threshold_otsu(strength)
    distance = gaussian(distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1], side / 64)
    apart = max(1, round(SEED_DISTANCE * side))
    peaks = peak_local_max(distance, min_distance=apart, labels=label(mask), exclude_border=False)
    markers = np.zeros(mask.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    areas = np.bincount(watershed(-distance, markers, mask=mask).ravel())[1:]
    return int((areas >= MIN_AREA * mask.size).sum())


def choose_tiles(counts: np.ndarray, stains: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return rows of tiles to ask for, as many of every count, and of every stain that has the count while it lasts.

    The counts go from 1 to the last one without a gap that `COMMON` tiles have. Where there are too few tiles of a
    count, they come again.

    Args:
        counts, stains (`np.ndarray` of shape `(n,)`): of the tiles there are.
        size (`int`): tiles to choose.
        seed (`int`): of the choice.

    Raises:
        ValueError: if not even one nucleus is common.
    """
    enough = np.bincount(counts, minlength=2)[1:] >= COMMON
    largest = len(enough) if enough.all() else int(np.argmin(enough))
    if not largest:
        raise ValueError(f"there are fewer than {COMMON} tiles with one nucleus: give a larger set")
    order = np.random.default_rng(seed).permutation(len(counts))
    queues = []
    for count in range(1, largest + 1):
        rows = [order[(counts[order] == count) & (stains[order] == stain)] for stain in np.unique(stains)]
        queues.append([each[k] for k in range(max(map(len, rows))) for each in rows if k < len(each)])
    return np.array([queues[k % largest][k // largest % len(queues[k % largest])] for k in range(size)])


def other_words(captions: Sequence[str]) -> np.ndarray:
    """Return which captions say the same but for the number and the noun, as int `(n,)`: equal where they do."""
    rest = [re.sub(r", \S+ (small|medium-sized|large)[^,]*", r", \1", caption, count=1) for caption in captions]
    return np.unique(rest, return_inverse=True)[1]


def agreement(
    measured: np.ndarray, asked: np.ndarray, tiles: np.ndarray, words: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Return how well counts agree, with 95 % intervals by the bootstrap over tiles.

    Args:
        measured, asked (`np.ndarray` of shape `(n,)`): counts.
        tiles (`np.ndarray` of shape `(n,)`): the tile that each count was taken from or asked by.
        words (`np.ndarray` of shape `(n,)`): from [`other_words`].

    Returns:
        `dict(spearman, spearman_of_number, mean_absolute_error, bias, exact, n)`: rank correlation; the same among
        captions whose other words are equal, since "small" and "crowded" go with many (partial: ranks less their mean
        over such captions); mean absolute error and mean error in nuclei; and the share that is right when rounded. A
        correlation is None where there is nothing that varies.

    The correlation is scipy's `spearmanr` (tests/test_evaluate_counts.py), here without its p-value.
    """
    from scipy.stats import rankdata  # of an extra

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.corrcoef(x, y)[0, 1]) if min(np.ptp(x), np.ptp(y)) > 1e-9 else math.nan

    def values(rows: np.ndarray) -> dict[str, float]:
        found, wanted = measured[rows], asked[rows]
        errors, ranks, group = found - wanted, (rankdata(found), rankdata(wanted)), words[rows]
        sizes = np.maximum(np.bincount(group), 1)
        within = (each - (np.bincount(group, each) / sizes)[group] for each in ranks)
        return {
            "spearman": correlation(*ranks),
            "spearman_of_number": correlation(*within),
            "mean_absolute_error": float(np.abs(errors).mean()),
            "bias": float(errors.mean()),
            "exact": float((np.rint(found) == wanted).mean()),
        }

    rng, names = np.random.default_rng(seed), np.unique(tiles)
    groups = [np.flatnonzero(tiles == name) for name in names]
    drawn = rng.integers(len(names), size=(DRAWS, len(names)))
    draws = [values(np.concatenate([groups[k] for k in each])) for each in drawn]
    result: dict = {"n": len(asked)}
    for name, value in values(np.arange(len(asked))).items():
        known = [each[name] for each in draws if not math.isnan(each[name])]
        low, high = map(float, np.quantile(known, [0.025, 0.975])) if known else (None, None)
        result[name] = {"value": None if math.isnan(value) else value, "low": low, "high": high}
    return result


def plot_counts(found: dict[str, dict[str, np.ndarray]], asked: np.ndarray, panel: int = 320) -> Image.Image:
    """Return a picture of asked against measured counts, a panel for each measure: every image, and the means.

    Args:
        found (`dict`): by measure, then by kind ("real", "generated"), counts `(n,)`.
        asked (`np.ndarray` of shape `(n,)`): counts.
        panel (`int`): side of a panel in pixels.
    """
    picture = Image.new("RGB", (len(found) * panel, panel), "white")
    draw = ImageDraw.Draw(picture)
    for number, (measure, kinds) in enumerate(found.items()):
        _draw_panel(draw, (number * panel + 40, 25, (number + 1) * panel - 15, panel - 40), measure, kinds, asked)
    return picture


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    measure: str,
    kinds: dict[str, np.ndarray],
    asked: np.ndarray,
) -> None:
    (left, top, right, bottom), font = box, ImageFont.load_default(12)
    end, highest = asked.max() + 1, 1.5 * asked.max() + 1
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(asked))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / end * (right - left), bottom - min(y, highest) / highest * (bottom - top)

    draw.rectangle(box, outline="black")
    draw.line((place(0, 0), place(end, end)), fill=(190, 190, 190))
    for tick in np.unique(asked):
        draw.text((place(tick, 0)[0], bottom + 4), f"{tick}", fill="black", font=font, anchor="ma")
        draw.text((left - 5, place(0, tick)[1]), f"{tick}", fill="black", font=font, anchor="rm")
    draw.text((left, top - 5), f"measured: {measure}", fill="black", font=font, anchor="ls")
    draw.text(((left + right) / 2, bottom + 34), "asked for", fill="black", font=font, anchor="ms")
    for line, (kind, counts) in enumerate(kinds.items()):
        colour, shift = COLOURS[kind], 0.3 * line - 0.15
        for x, y in zip(asked + shift + jitter, counts):
            across, down = place(x, y)
            draw.ellipse((across - 1, down - 1, across + 1, down + 1), fill=colour)
        draw.line([place(each, counts[asked == each].mean()) for each in np.unique(asked)], fill=colour, width=2)
        draw.text((left + 6, top + 4 + 14 * line), kind, fill=colour, font=font)


def render_counts(results: dict) -> str:
    """Return the results of train_scripts/evaluate_counts.py as a Markdown table."""
    kinds = {
        "generated": "generated, against asked",
        "real_same_prompts": "real tiles of the same prompts, against masks",
        "real_test": "all real test tiles, against masks",
    }
    head = ["Counted by", "In", "Stain", "Rank correlation", "Of the number alone", "Mean absolute error", "Bias"]
    head += ["Exact", "n"]
    rows = [head, ["---"] * len(head)]
    for measure, entries in results["measures"].items():
        for kind, words in kinds.items():
            for stain, entry in {"all": entries[kind]["overall"], **entries[kind]["by_stain"]}.items():
                parts = ("spearman", "spearman_of_number", "mean_absolute_error", "bias", "exact")
                rows.append([measure, words, stain, *(_cell(entry[part]) for part in parts), f"{entry['n']}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + f"\n\n`{results['command']}`\n"


def _cell(entry: dict) -> str:
    return "-" if entry["value"] is None else f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
