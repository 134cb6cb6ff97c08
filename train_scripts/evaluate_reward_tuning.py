"""Measure adapters that were tuned to a reward: does a judge that is no reward see the gain, and what did it cost?

python train_scripts/evaluate_reward_tuning.py --loras runs/ddpo-*/lora --dataset_name pbc --output tuned.json
Images of held-out prompts are drawn with and without each adapter, from the same seeds. The judge is a classifier that
is trained on splits of the set that no reward has seen.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visbio_diffusers import evaluation
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation import features as judging
from visbio_diffusers.evaluation.sampling import stored_images
from visbio_diffusers.evaluation.subtypes import Subtypes
from visbio_diffusers.evaluation.tuning import Judged, compare, render_tuning, share_right
from visbio_diffusers.files import digest
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import DEFAULT_MODEL, LORA_WEIGHTS, load_pipeline
from visbio_diffusers.prompts import load_prompts
from visbio_diffusers.rounds import LOG_NAME
from visbio_diffusers.training import TIME_NAME


JUDGE = {"width": 40, "kernel_size": 5, "seed": 11}  # of another shape than the reward's vision model


@dataclass(frozen=True, kw_only=True)
class EvaluateTuningConfig:
    """Measure adapters that were tuned to a reward."""

    loras: list[str] = field(metadata={"help": "folders of adapters: trainings from several seeds"})
    dataset_name: str = field(metadata={"help": "real images with subtypes, for the judge"})
    output: str = field(metadata={"help": "JSON file for the results; a picture goes beside it"})
    others: list[str] = field(default_factory=list, metadata={"help": "more adapters to compare with, as name=folder"})
    model: str = flag("", "pipeline that the adapters are for; default is the one that we ship")
    caption_bank: str = flag("bloodmnist", "bank whose held-out prompts are drawn, and by which the set is read")
    judge_splits: list[str] = field(
        default_factory=lambda: ["val", "test"], metadata={"help": "splits that the judge learns from"}
    )
    real_split: str = flag("train", "split on which the judge is tried")
    judge_steps: int = flag(1500, "optimizer steps of the judge")
    num_images_per_prompt: int = flag(12, "images of each held-out prompt")
    num_class_images: int = flag(48, "images of the plain caption of each class")
    num_processes: int = flag(2, "processes that draw")
    seed: int = flag(0, "of the images")


class Asked(Subtypes):
    """Prompts of the subtypes of a bank, and of its classes, with what each shows."""

    def __init__(self, config: EvaluateTuningConfig):
        super().__init__(load_bank(config.caption_bank))
        heldout = load_prompts(config.caption_bank).heldout  # one of each subtype in turn
        count = config.num_images_per_prompt
        self.prompts = [text for text in heldout for _ in range(count)]
        self.labels = np.repeat(np.arange(len(heldout)) % len(self.names), count)
        plain = [self.bank.plain_caption(k) for k in range(len(self.bank.class_names))]
        self.class_prompts = [text for text in plain for _ in range(config.num_class_images)]
        self.class_labels = np.repeat(np.arange(len(plain)), config.num_class_images)


def real_images(config: EvaluateTuningConfig, subtypes: Asked, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return real images of a split with the number of their subtypes, without those of which it is unknown."""
    bank = config.caption_bank
    found = subtypes.real(load_image_dataset(config.dataset_name, split, resolution=side, caption_bank=bank))
    return found.images, found.labels


def train_judge(config: EvaluateTuningConfig, subtypes: Asked, side: int):
    """Return a classifier of subtypes and its accuracy on real images; kept beside the output, and read from there."""
    folder = Path(config.output).with_suffix("") / "judge"
    settings = {**JUDGE, "steps": config.judge_steps, "splits": config.judge_splits, "resolution": side}
    settings |= {"dataset": config.dataset_name, "caption_bank": config.caption_bank}
    images, labels = real_images(config, subtypes, config.real_split, side)
    if folder.is_dir():
        model, training = judging.load(folder)
        if {name: training.get(name) for name in settings} != settings:
            raise ValueError(f"{folder} was trained with other settings: delete it")
    else:
        parts = [real_images(config, subtypes, split, side) for split in config.judge_splits]
        known = [np.concatenate(each) for each in zip(*parts)]
        options = {**JUDGE, "steps": config.judge_steps, "num_classes": len(subtypes.names)}
        model = evaluation.train_classifier(*known, **options, description="training the judge")
        judging.save(model, folder, settings)
    return model, share_right(judging.predictions(model, judging.features(model, images)), labels)


def draw(config: EvaluateTuningConfig, lora: str | None, prompts: list[str]) -> np.ndarray:
    """Return the images of prompts, with an adapter or without; what was drawn before is not drawn again."""
    model = config.model or None
    sha256 = digest(Path(lora) / LORA_WEIGHTS) if lora else ""
    request = config.model or DEFAULT_MODEL, sha256, prompts, config.seed
    store = Path(config.output).with_suffix("") / "images" / evaluation.store_name(*request)
    settings = (model, None, "float32", lora, 1.0)
    return stored_images(settings, prompts, config.seed, 64, store, config.num_processes)


def judged(model, subtypes: Asked, images: np.ndarray, class_images: np.ndarray) -> Judged:
    """Return for each image whether it is what was asked for, and how sure the judge is; and its features."""
    found = judging.features(model, images)
    logits = model.head(torch.as_tensor(found)).log_softmax(dim=1).detach().numpy()
    answers = judging.predictions(model, judging.features(model, class_images))
    return {
        "right": (logits.argmax(axis=1) == subtypes.labels).astype(float),
        "log_prob": logits[np.arange(len(logits)), subtypes.labels],
        "class_right": (subtypes.classes[answers] == subtypes.class_labels).astype(float),
        "features": found,
    }


def by_subtype(subtypes: Asked, entries: dict[str, list[dict]]) -> dict:
    """Return the share recognised of each subtype."""
    return {
        name: {
            kind: float(np.mean([each["right"][subtypes.labels == row].mean() for each in found]))
            for kind, found in entries.items()
        }
        for row, name in enumerate(subtypes.names)
    }


def history(lora: str) -> dict[str, float]:
    """Return the minutes of training and the images scored of an adapter, as its training has recorded them."""
    folder = Path(lora).parent
    seconds = json.loads((folder / TIME_NAME).read_text())["seconds"] if (folder / TIME_NAME).exists() else 0.0
    rounds = folder / LOG_NAME
    rows = [json.loads(line) for line in rounds.read_text().splitlines()] if rounds.exists() else []
    return {"minutes": seconds / 60, "queries": sum(row.get("queries", 0) for row in rows)}


def main(config: EvaluateTuningConfig) -> int:
    """Measure all adapters, and write results and picture."""
    subtypes = Asked(config)
    side = load_pipeline(config.model or None)[0].unet.config.sample_size
    model, real = train_judge(config, subtypes, side)
    named = [each.partition("=") for each in config.others]
    if any(not folder or name in ("base", "tuned") for name, _, folder in named):
        raise ValueError(f"others are given as name=folder, under other names than base and tuned: {config.others}")
    others = {name: [folder] for name, _, folder in named}
    pictures, entries, adapters = {}, {}, {}
    sizes = config.num_images_per_prompt, config.num_class_images
    for name, folders in {"base": [None], "tuned": config.loras, **others}.items():
        drawn = [
            (draw(config, each, subtypes.prompts), draw(config, each, subtypes.class_prompts)) for each in folders
        ]
        pictures[name] = drawn[0][0]
        entries[name] = [judged(model, subtypes, *each) for each in drawn]
        if name != "base":
            costs = [history(each) for each in folders]
            costs = {key: float(np.mean([each[key] for each in costs])) for key in costs[0]}
            found = compare(entries[name], entries["base"][0], *sizes)
            adapters[name] = {"trainings": len(folders), **found, **costs, "queries": int(costs["queries"])}
    results = {
        **evaluation.environment(),
        "judge": {**JUDGE, "sha256": evaluation.weights_hash(model), "splits": config.judge_splits, "real": real},
        "base": {key: float(entries["base"][0][key].mean()) for key in ("right", "log_prob", "class_right")},
        "adapters": adapters,
        "by_subtype": by_subtype(subtypes, entries),
    }
    evaluation.write_results(results, config.output)
    save_picture(config, subtypes, pictures)
    sys.stdout.write(render_tuning(results))
    return 0


def save_picture(config: EvaluateTuningConfig, subtypes: Asked, pictures: dict[str, np.ndarray]) -> None:
    """Draw a sheet of the first prompt of each subtype: base and first adapter from the same seeds."""
    tiles, titles = [], []
    for row, name in enumerate(subtypes.names):
        first = int(np.flatnonzero(subtypes.labels == row)[0])
        for kind in ("base", "tuned"):
            tiles += [Image.fromarray(image) for image in pictures[kind][first : first + 6]]
            titles += [f"{name} ({kind})"] * 6
    save_png(
        contact_sheet(tiles, titles, columns=12, tile=96, caption_lines=2), Path(config.output).with_suffix(".png")
    )


if __name__ == "__main__":
    run(main, parse(EvaluateTuningConfig, {}))
