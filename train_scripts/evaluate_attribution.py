"""Measure maps of words where the truth is known: does the map of a cell's name lie on the cell, off the middle too?

python train_scripts/evaluate_attribution.py --blood data/medmnist/bloodmnist_rebuilt_28.npz \
    --nuclei data/dsb2018_cellpose --nuclei_lora model_cards/visbio-nuclei-lora --output attribution.json

Real images, noised: blood cells that were moved to a corner of their own background, and tiles of photographs with
masks whose nuclei lie off the middle. Heads are chosen on the train split. Beside each map stand those of other words
and of another image, the middle of the image, and its brightness.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import evaluation
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.explanation.attribution import (
    LEVELS,
    AttentionRecorder,
    all_heads,
    attribute_image,
    merge_words,
    word_tokens,
)
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


LOADERS = {"blood": off_centre_cells, "nuclei": off_centre_nuclei}
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
    choice_split: str = flag("train", "of both sets, on which heads are chosen")
    num_images: int = flag(200, "of each set")
    num_choice_images: int = flag(40, "of each set's train split, on which heads are chosen")
    num_heads: int = flag(3, "heads to choose")
    num_noises: int = flag(2, "noises at each level")
    seed: int = flag(0, "of the choice of images, the noises and the other words")

    def __post_init__(self) -> None:
        """Check the values."""
        if not (self.blood or self.nuclei):
            raise ValueError("nothing to measure on: give --blood, --nuclei or both")
        if min(self.num_images, self.num_choice_images) < 2:
            raise ValueError("num_images and num_choice_images must be at least 2")


def main(config: EvaluateAttributionConfig) -> int:
    """Measure, write JSON and picture, print the table."""
    pipes, models, by_head = {}, {}, {}
    for name in LOADERS:
        if getattr(config, name):
            lora = config.nuclei_lora or None if name == "nuclei" else None
            pipes[name], models[name] = load_pipeline(config.model or None, lora=lora)
            truth = load_truth(config, pipes[name], name, config.choice_split, config.num_choice_images)
            heads = {str(head): [head] for head in all_heads(pipes[name].unet)}
            maps = draw_maps(config, pipes[name], truth, heads)
            by_head[name] = {head: mean_auc(truth, own_maps(truth, found)) for head, found in maps.items()}
    names = [str(head) for head in all_heads(pipes[name].unet)]
    ranked = sorted(names, key=lambda head: -sum(each[head]["value"] for each in by_head.values()))
    chosen = [all_heads(pipes[name].unet)[names.index(head)] for head in ranked[: config.num_heads]]
    sets, tiles = {}, []
    for name, pipe in pipes.items():
        truth = load_truth(config, pipe, name, config.split, config.num_images)
        maps = draw_maps(config, pipe, truth, {"chosen heads": chosen, "all heads": None})
        entry = {"kinds": count(truth.kinds), "auc": measure(config, truth, maps), "by_head": by_head[name]}
        sets[name] = {"model": models[name], **entry}
        tiles += picture_rows(truth, maps)
    settings = {"split": config.split, "choice_split": config.choice_split, "num_noises": config.num_noises}
    settings |= {"levels": LEVELS, "seed": config.seed, "chosen_heads": chosen}
    evaluation.write_results({**evaluation.environment(), **settings, "sets": sets}, config.output)
    titles = ["image", "truth", "chosen heads", "all heads"] * (len(tiles) // 4)
    picture = contact_sheet(tiles, titles, columns=16, tile=84, caption_lines=1)
    save_png(picture, Path(config.output).with_suffix(".png"))
    sys.stdout.write(f"Chosen (layer, head): {chosen}\n\n{render(sets)}")
    return 0


def load_truth(config: EvaluateAttributionConfig, pipe, name: str, split: str, count: int) -> Truth:
    """Return images of one set at the size of the model."""
    return LOADERS[name](getattr(config, name), split, count, config.seed, pipe.unet.config.sample_size)


def draw_maps(config: EvaluateAttributionConfig, pipe, truth: Truth, heads: dict) -> dict[str, list]:
    """Return for each choice of heads words and maps of each image, all from one pass over it."""
    found = {name: [] for name in heads}
    for row, image in enumerate(tqdm(truth.images, desc="images", unit="image")):
        words = word_tokens(pipe.tokenizer, truth.prompts[row], pipe.tokenizer.model_max_length)
        image = Image.fromarray(image)
        with ExitStack() as stack:
            n = len(LEVELS) * config.num_noises
            recorders = {
                name: stack.enter_context(AttentionRecorder(pipe.unet, n, each)) for name, each in heads.items()
            }
            seed = config.seed + row
            attribute_image(pipe, image, truth.prompts[row], num_noises=config.num_noises, seed=seed)
        for name, recorder in recorders.items():
            token_maps = recorder.token_maps(image.height, image.width).mean(dim=0)
            each = merge_words(image, words, token_maps)
            found[name].append((each.words, each.maps))
    return found


def own_maps(truth: Truth, found: list) -> list[np.ndarray]:
    """Return the map of the word whose place is known, of each image."""
    return [maps[words.index(word)] for (words, maps), word in zip(found, truth.words)]


def mean_auc(truth: Truth, maps: list[np.ndarray]) -> dict:
    """Return the mean AUC of maps, one for each image, with its interval."""
    return mean_interval(np.array([pixel_auc(*pair) for pair in zip(maps, truth.masks)]))


def measure(config: EvaluateAttributionConfig, truth: Truth, maps: dict[str, list]) -> dict:
    """Return the AUC of each choice of heads and of controls over the images of a set, with intervals."""
    rng = np.random.default_rng(config.seed)
    rows = {}
    for name, found in maps.items():
        own = own_maps(truth, found)
        any_word = [each[rng.integers(len(words))] for words, each in found]
        other = [
            each[rng.choice([k for k, other in enumerate(words) if other != word])]
            for (words, each), word in zip(found, truth.words)
        ]
        rows |= {name: own, f"{name}, shuffled words": any_word, f"{name}, another word": other}
        rows[f"{name}, another image"] = own[1:] + own[:1]
    rows["middle of the image"] = [centred_gaussian(*truth.masks.shape[1:])] * len(truth.images)
    rows["brightness"] = list(truth.images.mean(axis=3))
    return {name: mean_auc(truth, each) for name, each in rows.items()}


def count(kinds: list[str]) -> dict[str, int]:
    """Return how many images there are of each class or stain."""
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def picture_rows(truth: Truth, maps: dict) -> list[Image.Image]:
    """Return image, truth and maps of the first images of a set."""
    tiles, own = [], {name: own_maps(truth, found) for name, found in maps.items()}
    for row in range(min(SHOWN, len(truth.images))):
        image = Image.fromarray(truth.images[row])
        tiles += [image, Image.fromarray(truth.masks[row])]
        for each in own.values():
            low, high = each[row].min(), each[row].max()
            tiles.append(tint(image, (each[row] - low) / (high - low)))
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
