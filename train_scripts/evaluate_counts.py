"""Measure whether a model draws as many nuclei as it is asked for.

python train_scripts/evaluate_counts.py --model runs/micro-64/pipeline --dataset_name dsb2018_cellpose \
    --output counts.json
The prompts are captions of tiles of the test split, as many of every count. Nuclei are counted in two ways that share
nothing, by a network that has learned from tiles of the train split (kept in `--evaluators`) and by a threshold with a
watershed; both count the real tiles too, which says how well one can count at all. A plot and a sheet of pictures go
beside the results.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from visbio_diffusers import evaluation
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import ImageDataset, load_image_dataset
from visbio_diffusers.data.channels import BRIGHT_FIELD, FLUORESCENCE, STAINS
from visbio_diffusers.evaluation.benchmark import warn_of_other_splits
from visbio_diffusers.evaluation.counts import (
    agreement,
    choose_tiles,
    count_by_network,
    count_by_watershed,
    counted,
    load_counter,
    other_words,
    plot_counts,
    render_counts,
)
from visbio_diffusers.evaluation.drawing import DrawingConfig
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.grid import save_png, sheet_of_rows


SHOWN = 6  # images of a count on either side of the sheet
COUNTS_SHOWN = (1, 2, 3, 5, 8, 12, 16, 24)


@dataclass(frozen=True, kw_only=True)
class EvaluateCountsConfig(DrawingConfig):
    """Measure whether a model draws as many nuclei as it is asked for."""

    dataset_name: str = field(metadata={"help": "photographs with masks in Cellpose's layout"})
    tile_size: int = flag(64, "side of a tile in pixels of the photographs")
    num_images: int = flag(512, "images to draw, as many of every count")
    counter_steps: int = flag(1500, "optimizer steps of the network that counts")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        super().__post_init__()
        if min(self.num_images, self.counter_steps, self.tile_size) < 1:
            raise ValueError("num_images, counter_steps and tile_size must be at least 1")


def by_stain(measured: np.ndarray, tiles: np.ndarray, real: ImageDataset, counts: np.ndarray) -> dict:
    """Return how well counts agree with those of tiles, which are rows of a set, overall and for each stain."""
    words = other_words(real.captions)

    def agreed(part: np.ndarray) -> dict:
        return agreement(measured[part], counts[tiles[part]], tiles[part], words[tiles[part]])

    stains = real.labels[tiles]
    entries = {STAINS[k]: agreed(np.flatnonzero(stains == k)) for k in np.unique(stains)}
    return {"overall": agreed(np.arange(len(tiles))), "by_stain": entries}


def save_sheet(images: np.ndarray, rows: np.ndarray, real: Split, stains: np.ndarray, file: Path) -> None:
    """Draw the first images of some counts beside real tiles of the same count and stain."""
    sheet, order = [], np.random.default_rng(0).permutation(len(stains))
    for stain in (name for name in STAINS if name != BRIGHT_FIELD):
        for count in COUNTS_SHOWN:
            same = (stains == STAINS.index(stain)) & (real.labels == count)
            drawn, shown = images[same[rows]][:SHOWN], order[same[order]][:SHOWN]
            if len(drawn):
                sides = drawn, real.images[shown]
                sheet.append((f"{stain}: {count}", *([Image.fromarray(each) for each in side] for side in sides)))
    save_png(sheet_of_rows(sheet, ("generated (synthetic), asked for so many", "real, test split")), file)


def main(config: EvaluateCountsConfig) -> int:
    """Draw, count, and write results, plot and sheet."""
    pipe, facts = config.load()
    warn_of_other_splits(config.model, config.dataset_name, config.lora)
    form = {"resolution": pipe.unet.config.sample_size, "tile_size": config.tile_size}
    real = load_image_dataset(config.dataset_name, "test", **form)
    train, test = counted(load_image_dataset(config.dataset_name, "train", **form)), counted(real)
    counter = load_counter(config.judges, train, config.counter_steps, config.device)
    rows = choose_tiles(test.labels, real.labels, config.num_images, config.seed)
    asked = test.labels[rows]
    images = config.draw(pipe, facts, [real.captions[row] for row in rows])

    bright = real.labels == STAINS.index(FLUORESCENCE)
    of_test = {"network": count_by_network(counter, test.images), "watershed": count_by_watershed(test.images, bright)}
    of_drawn = {"network": count_by_network(counter, images), "watershed": count_by_watershed(images, bright[rows])}
    measures = {
        name: {
            "generated": by_stain(of_drawn[name], rows, real, test.labels),
            "real_same_prompts": by_stain(of_test[name][rows], rows, real, test.labels),
            "real_test": by_stain(of_test[name], np.arange(len(real)), real, test.labels),
        }
        for name in of_test
    }
    results = {
        **evaluation.environment(),
        **facts,
        "dataset": config.dataset_name,
        "resolution": form["resolution"],
        "drawing": {**config.options, "seed": config.seed, "dtype": config.dtype},
        "counter_sha256": evaluation.weights_hash(counter),
        "asked": {int(count): int((asked == count).sum()) for count in np.unique(asked)},
        "measures": measures,
    }
    evaluation.write_results(results, config.output)
    found = {name: {"real": of_test[name][rows], "generated": of_drawn[name]} for name in of_test}
    output = Path(config.output)
    save_png(plot_counts(found, asked), output.with_suffix(".png"))
    save_sheet(images, rows, test, real.labels, output.with_name(f"{output.stem}-sheet.png"))
    sys.stdout.write(render_counts(results))
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateCountsConfig, {}))
