"""Measure maps of words where the truth is known: does the map of a cell's name lie on the cell, off the middle too?

python train_scripts/evaluate_attribution.py --blood data/medmnist/bloodmnist_rebuilt_28.npz \
    --nuclei data/dsb2018_cellpose --nuclei_lora model_cards/visbio-nuclei-lora --output attribution.json

Real images, noised: blood cells that were moved to a corner of their own background, and tiles of photographs with
masks whose nuclei lie off the middle. Beside each map stand those of another word and of another image, the middle of
the image, and its brightness.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import evaluation
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.explanation.effect import attribute_image, word_effects
from visbio_diffusers.explanation.truth import (
    Truth,
    centred_gaussian,
    mean_interval,
    off_centre_cells,
    off_centre_nuclei,
    pixel_auc,
)
from visbio_diffusers.grid import contact_sheet, save_png, tint
from visbio_diffusers.load import load_pipeline


METHODS = {"effect": word_effects, "attention": attribute_image}
SHOWN = 8  # images of each set in the picture


@dataclass(frozen=True, kw_only=True)
class EvaluateAttributionConfig:
    """Measure maps of words where the truth is known."""

    output: str = field(metadata={"help": "JSON file for the results; a picture goes beside it"})
    blood: str = flag("", "rebuilt BloodMNIST")
    nuclei: str = flag("", "photographs of nuclei with masks in Cellpose's layout")
    nuclei_lora: str = flag("", "adapter of the model for nuclei")
    model: str = flag("", "pipeline; default is the one that we ship")
    split: str = flag("test", "of both sets")
    num_images: int = flag(200, "of each set")
    num_noises: int = flag(1, "noises at each level")
    seed: int = flag(0, "of the choice of images, the noises and the other words")

    def __post_init__(self) -> None:
        """Check the values."""
        if not (self.blood or self.nuclei):
            raise ValueError("nothing to measure on: give --blood, --nuclei or both")
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")


def main(config: EvaluateAttributionConfig) -> int:
    """Measure, write JSON and picture, print the table."""
    sets, tiles = {}, []
    for name, load, lora in (("blood", off_centre_cells, None), ("nuclei", off_centre_nuclei, config.nuclei_lora)):
        if not getattr(config, name):
            continue
        pipe, provenance = load_pipeline(config.model or None, lora=lora or None)
        size = pipe.unet.config.sample_size
        truth = load(getattr(config, name), config.split, config.num_images, config.seed, size)
        maps = {method: draw_maps(config, pipe, truth, method) for method in METHODS}
        sets[name] = {"model": provenance, "kinds": count(truth.kinds), **measure(config, truth, maps)}
        tiles += picture_rows(truth, maps)
    settings = {"split": config.split, "num_noises": config.num_noises, "seed": config.seed}
    evaluation.write_results({**evaluation.environment(), **settings, "sets": sets}, config.output)
    titles = ["image", "truth", *METHODS] * (len(tiles) // (2 + len(METHODS)))
    save_png(contact_sheet(tiles, titles, columns=16, tile=84, caption_lines=1), Path(config.output).with_suffix(".png"))
    sys.stdout.write(render(sets))
    return 0


def draw_maps(config: EvaluateAttributionConfig, pipe, truth: Truth, method: str) -> list[tuple[list[str], np.ndarray]]:
    """Return the words of each image, and a map for each."""
    found = []
    for row, image in enumerate(tqdm(truth.images, desc=method, unit="image")):
        explain = METHODS[method]
        seed = config.seed + row
        each = explain(pipe, Image.fromarray(image), truth.prompts[row], num_noises=config.num_noises, seed=seed)
        found.append((each.words, each.maps))
    return found


def measure(config: EvaluateAttributionConfig, truth: Truth, maps: dict) -> dict:
    """Return the AUC of each method and control over the images of a set, with intervals."""
    n, (height, width) = len(truth.images), truth.masks.shape[1:]
    rng = np.random.default_rng(config.seed)
    aucs = {}
    for method, found in maps.items():
        own = [each[words.index(word)] for (words, each), word in zip(found, truth.words)]
        other = [
            each[rng.choice([k for k, other in enumerate(words) if other != word])]
            for (words, each), word in zip(found, truth.words)
        ]
        aucs |= {method: own, f"{method}, another word": other, f"{method}, another image": own[1:] + own[:1]}
    aucs["middle of the image"] = [centred_gaussian(height, width)] * n
    aucs["brightness"] = list(truth.images.mean(axis=3))
    return {
        "auc": {
            name: mean_interval(np.array([pixel_auc(*pair) for pair in zip(each, truth.masks)]))
            for name, each in aucs.items()
        },
    }


def count(kinds: list[str]) -> dict[str, int]:
    """Return how many images there are of each class or stain."""
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def picture_rows(truth: Truth, maps: dict) -> list[Image.Image]:
    """Return image, truth and maps of the first images of a set."""
    tiles = []
    for row in range(min(SHOWN, len(truth.images))):
        image = Image.fromarray(truth.images[row])
        tiles += [image, Image.fromarray(truth.masks[row])]
        for found in maps.values():
            words, each = found[row]
            own = each[words.index(truth.words[row])]
            tiles.append(tint(image, (own - own.min()) / max(np.ptp(own), 1e-9)))
    return tiles


def render(sets: dict) -> str:
    """Return the results as a Markdown table, a column for each set."""
    rows = [["Map", *sets], ["---"] * (1 + len(sets))]
    for name in next(iter(sets.values()))["auc"]:
        entries = [each["auc"][name] for each in sets.values()]
        rows.append([name, *(f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})" for each in entries)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    run(main, parse(EvaluateAttributionConfig, {}))
