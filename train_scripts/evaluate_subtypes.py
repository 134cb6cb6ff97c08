"""Measure whether a model draws the subtype that is asked for: band or segmented neutrophil, stage of a granulocyte.

python train_scripts/evaluate_subtypes.py --model runs/micro-64/pipeline --dataset_name pbc64 --output subtypes.json
Two classifiers that share neither seed nor shape learn the subtypes from the train split at the size that the model
draws, are kept in `--evaluators`, and say what drawn images show, and real ones of the test split. A sheet of both
goes beside the results.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from visbio_diffusers import evaluation
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation.benchmark import warn_of_other_splits
from visbio_diffusers.evaluation.drawing import DrawingConfig
from visbio_diffusers.evaluation.evaluators import EVALUATORS, SELF_SUPERVISED, Evaluator, load_evaluators
from visbio_diffusers.evaluation.features import features, predictions
from visbio_diffusers.evaluation.images import Split
from visbio_diffusers.evaluation.metrics import fidelity
from visbio_diffusers.evaluation.sampling import IMAGES_PER_PROMPT
from visbio_diffusers.evaluation.subtypes import Subtypes, at_equal_shares, by_prompt, render_subtypes
from visbio_diffusers.grid import save_png, sheet_of_rows


SHOWN = 8  # images of a subtype on either side of the sheet


@dataclass(frozen=True, kw_only=True)
class EvaluateSubtypesConfig(DrawingConfig):
    """Measure whether a model draws the subtype that is asked for."""

    dataset_name: str = field(metadata={"help": "real images with subtypes, splits train and test"})
    caption_bank: str = flag("bloodmnist", "bank that names the subtypes")
    num_images_per_subtype: int = flag(64, "images of the plain caption of each subtype")
    num_wording_images_per_subtype: int = flag(32, "images of each subtype by held-out captions; 0 leaves them out")
    evaluator_steps: int = flag(2000, "optimizer steps of an evaluator")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        super().__post_init__()
        if min(self.num_images_per_subtype, self.evaluator_steps) < 1 or self.num_wording_images_per_subtype < 0:
            raise ValueError("num_images_per_subtype and evaluator_steps must be at least 1, that of wording 0")


def wording(subtypes: Subtypes, size: int) -> tuple[list[str], np.ndarray]:
    """Return `size` held-out captions of each subtype that has some, each several times in a row, and the subtypes."""
    captions = [subtypes.heldout_captions(row) for row in range(len(subtypes.names))]
    rows = np.repeat([row for row, each in enumerate(captions) if each], size).astype(int)
    places = np.arange(len(rows)) % max(size, 1) // IMAGES_PER_PROMPT
    return [captions[row][place % len(captions[row])] for row, place in zip(rows, places)], rows


def judged(judge: Evaluator, subtypes: Subtypes, drawn: Split, test: Split, worded: Split, prompts: list[str]) -> dict:
    """Return what a classifier recognises in drawn images, in those by held-out wording, and in real ones."""

    def recognised(split: Split) -> dict:
        answers = predictions(judge.model, features(judge.model, split.images))
        return fidelity(answers, split.labels, subtypes.names)

    real = recognised(test)
    entry = {
        "training": judge.training,
        "sha256": evaluation.weights_hash(judge.model),
        "generated": recognised(drawn),
        "real_test": real | {"at_equal_shares": at_equal_shares(real)},
    }
    if prompts:
        answers = predictions(judge.model, features(judge.model, worded.images))
        entry["heldout_wording"] = fidelity(answers, worded.labels, subtypes.names)
        entry["heldout_wording"]["by_prompt"] = by_prompt(answers == worded.labels, prompts)
    return entry


def main(config: EvaluateSubtypesConfig) -> int:
    """Draw, ask the classifiers, and write results and sheet."""
    subtypes = Subtypes(load_bank(config.caption_bank))
    pipe, facts = config.load()
    warn_of_other_splits(config.model, config.dataset_name, config.lora)
    form = {"resolution": pipe.unet.config.sample_size, "caption_bank": config.caption_bank}
    train, test = (
        subtypes.real(load_image_dataset(config.dataset_name, split, **form)) for split in ("train", "test")
    )
    names = [name for name in EVALUATORS if name not in SELF_SUPERVISED]
    options = {"device": config.device, "names": names}
    judges = load_evaluators(config.judges, train, test, len(subtypes.names), config.evaluator_steps, **options)

    labels = np.repeat(np.arange(len(subtypes.names)), config.num_images_per_subtype)
    drawn = Split(config.draw(pipe, facts, [subtypes.plain_caption(row) for row in labels]), labels)
    prompts, rows = wording(subtypes, config.num_wording_images_per_subtype)
    worded = Split(config.draw(pipe, facts, prompts), rows) if prompts else drawn
    results = {
        **evaluation.environment(),
        **facts,
        "dataset": config.dataset_name,
        "resolution": form["resolution"],
        "drawing": {**config.options, "seed": config.seed, "dtype": config.dtype},
        "subtypes": subtypes.names,
        "evaluators": {each.name: judged(each, subtypes, drawn, test, worded, prompts) for each in judges},
    }
    evaluation.write_results(results, config.output)
    order = np.random.default_rng(config.seed).permutation(len(test.labels))
    sides = drawn, Split(test.images[order], test.labels[order])
    sheet = [
        (name, *([Image.fromarray(each) for each in side.images[side.labels == row][:SHOWN]] for side in sides))
        for row, name in enumerate(subtypes.names)
    ]
    save_png(
        sheet_of_rows(sheet, ("generated (synthetic)", "real, test split")), Path(config.output).with_suffix(".png")
    )
    sys.stdout.write(render_subtypes(results))
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateSubtypesConfig, {}))
