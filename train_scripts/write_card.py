"""Write all model cards, with the code of pipelines, and the table of the benchmark, from files of commands.

python train_scripts/write_card.py
Reads the results of visbio evaluate and audit, training.json of the training scripts, and the rows of benchmark.py; no
number is typed by hand, and a test compares what stands in the cards with what this writes.
"""

import json
import logging
import sys
from pathlib import Path

from visbio_diffusers.cards import render_card
from visbio_diffusers.evaluation.features import load, weights_hash
from visbio_diffusers.evaluation.report import between_markers, cell, render_benchmark
from visbio_diffusers.hub import code_of


ROOT = Path(__file__).parent.parent
ROWS = ("real", "checkpoint", "both", "cross_attention", "film", "unet2d_our_recipe", "unet2d")
MARKER = "benchmark: train_scripts/write_card.py"
JUDGES = {
    "cnn3": "classifier, 3 x 3 filters",
    "cnn5": "classifier, 5 x 5 filters",
    "simclr": "no labels: SimCLR, Chen et al. 2020",
    "clip": "images and captions: CLIP, Radford et al. 2021",
}
EVALUATORS_CARD = """---
license: cc-by-4.0
tags: [biology, microscopy, haematology, evaluation]
---

# {name}

The judges of `visbio evaluate` on `{dataset}` at {size} px: residual networks trained on its train split alone, with
shifts, turns, blur, resizing, noise and light varied, so that they do not rely on sharpness. `visbio evaluate` finds
them by the hash of the training images. **Judges only**: a model that was tuned to please one is refused.

| Judge | Learned from | Parameters | Right on real test images | SHA-256 of the weights |
| --- | --- | --- | --- | --- |
{rows}
The last column but one: images recognised as their class; of clip, images nearer to the caption of their class than to
any other. n = {num_test} test images ({num_matched} for clip), measured by `{command}`.

Data: PBC dataset, Acevedo et al. 2020, and MedMNIST v2, Yang et al. 2023, CC BY 4.0.
"""


def evaluators_card(folder: Path, results: dict) -> str:
    """Return the card of a folder of judges, with their accuracies as the results of a model have them."""
    rows = ""
    for judge in [*results["evaluators"], results["alignment_evaluator"]]:
        if judge["name"] not in JUDGES:  # an extractor of the user's own
            continue
        if weights_hash(load(folder / judge["name"])[0]) != judge["sha256"]:
            raise ValueError(f"the results were measured by another {judge['name']} than that in {folder}")
        real = judge["real_test"] or {}
        cells = [judge["name"], JUDGES[judge["name"]], f"{judge['parameters']:,}"]
        cells += [cell(real.get("overall", real.get("retrieval"))), judge["sha256"][:12]]
        rows += "| " + " | ".join(cells) + " |\n"
    return EVALUATORS_CARD.format(
        name=folder.name,
        size=folder.name.rpartition("-")[2],
        dataset=results["dataset"],
        rows=rows,
        num_test=results["split"]["num_test"],
        num_matched=results["alignment_evaluator"]["real_test"]["retrieval"]["n"],
        command=results["command"],
    )


def benchmark(folder: Path) -> str:
    """Return the table of the rows whose results are in a folder."""
    files = [folder / f"{row}.json" for row in ROWS]
    return render_benchmark([json.loads(file.read_text()) for file in files if file.exists()])


def render(root: Path) -> dict[Path, str]:
    """Return the text of every file that this script writes."""
    texts = {}
    for file in root.glob("model_cards/*/about.md"):
        texts |= {file.with_name("README.md"): render_card(file.parent), **code_of(file.parent)}
    for folder in root.glob("model_cards/evaluators-*"):
        results = root / "model_cards" / folder.name.replace("evaluators", "visbio") / "results.json"
        texts[folder / "README.md"] = evaluators_card(folder, json.loads(results.read_text()))
    for folder in root.glob("model_cards/benchmark-*"):
        for readme in (root / "README.md", folder / "README.md"):
            texts[readme] = between_markers(texts.get(readme) or readme.read_text(), MARKER, benchmark(folder))
    return texts


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    if len(sys.argv) > 1:
        sys.exit("usage: python train_scripts/write_card.py, without arguments")
    for path, text in render(ROOT).items():
        path.write_text(text)
