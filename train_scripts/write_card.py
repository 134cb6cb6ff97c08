"""Write all model cards, and the table of the benchmark there and in README.md, from files that commands have written.

python train_scripts/write_card.py
Reads results.json (visbio evaluate), training.json (the training script), the rows of benchmark.py and file sizes; no
number is typed by hand, and a test compares what stands in the cards with what this writes.
"""

import json
import logging
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from visbio_diffusers.evaluation.features import load, weights_hash
from visbio_diffusers.evaluation.report import between_markers, cell, render_benchmark, render_card_results


ROOT = Path(__file__).parent.parent
ROWS = ("real", "checkpoint", "both", "cross_attention", "film", "unet2d_our_recipe", "unet2d")
MARKER = "benchmark: train_scripts/write_card.py"
CARD = """---
{yaml}
---

# {name}

Draws stained blood cells, {size} x {size} pixels, from their descriptions. Synthetic images; **not for clinical use**.

![Eight classes, four images each, from the pipeline's defaults](grid.png)

```python
from visbio_diffusers import VisBioPipeline

pipe = VisBioPipeline.from_pretrained("model_cards/{name}")
pipe("a segmented neutrophil, Wright-Giemsa stain").images[0].save("neutrophil.png")
```

## Intended use and limits

For research: augmenting and balancing sets of blood cell images, teaching, testing of image analysis. It knows eight
classes (basophil, eosinophil, erythroblast, immature granulocyte, lymphocyte, monocyte, neutrophil, platelet) and five
subtypes as one instrument saw them in healthy donors; diseased cells, other stains and other microscopes are outside
what it has seen, and a description of such cells gives an image of something else. Not for diagnosis, nor for
training a device that diagnoses, without validation on real images. Every file that `visbio generate` writes carries
its prompt, seed, model and the word "synthetic".

## Data and licences

Trained on the training split of rebuilt BloodMNIST at 28 px (11,959 images; class counts equal the official ones, the
membership of the splits does not): PBC dataset, Acevedo et al. 2020, and MedMNIST v2, Yang et al. 2023, CC BY 4.0.
Captions: `visbio_diffusers/caption_banks/bloodmnist.yaml`. The text encoder was trained on the project's captions, on
2,852 PubMed abstracts (collected by PubMedQA, MIT, and the Hallmarks of Cancer corpus, GPL-3), and on 9,697 figure
captions of ROCO (CC BY, CC0, CC BY-SA). Weights: Apache-2.0.

## Training

{training}

UNet {unet_mb:.1f} MB, text encoder {text_mb:.1f} MB, both fp16.

## Results

{results}
"""


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

The judges of `visbio evaluate` on rebuilt BloodMNIST at 28 px: residual networks trained on its train split alone,
with shifts, turns, blur, resizing, noise and light varied, so that they do not rely on sharpness. `visbio evaluate`
finds them by the hash of the training images. **Judges only**: a model that was tuned to please one is refused.

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
        rows=rows,
        num_test=results["split"]["num_test"],
        num_matched=results["alignment_evaluator"]["real_test"]["retrieval"]["n"],
        command=results["command"],
    )


def training_text(folder: Path) -> str:
    """Return the commands, the versions and the machine of the training."""
    training = json.loads((folder / "training.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in training["versions"].items())
    hardware = training["hardware"]["gpu"] or f"CPU, {training['hardware']['cpu']}"
    git = training["git"] or {}
    commit = (git.get("commit") or "none")[:12] + (" with changes" if git.get("dirty") else "")
    lines = [f"`{training['command']}`", f"Commit {commit}; {hardware}; {versions}."]
    notes = folder / "training_notes.md"
    return "\n\n".join(lines + ([notes.read_text().strip()] if notes.exists() else []))


def card_data(name: str, results: dict) -> ModelCardData:
    """Return the metadata that the Hub reads."""
    judge, run = results["evaluators"][0]["name"], results["runs"][0]
    fidelity = run["evaluators"][judge]["fidelity"]["overall"]["value"]
    return ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["biology", "microscopy", "haematology", "synthetic"],
        model_name=name,
        eval_results=None,
        **{"fidelity": {f"recognised by {judge}": round(fidelity, 4)}},
    )


def card(folder: Path) -> str:
    """Return the card of a trained pipeline."""
    results = json.loads((folder / "results.json").read_text())
    text = CARD.format(
        yaml=card_data(folder.name, results).to_yaml(),
        name=folder.name,
        size=json.loads((folder / "unet" / "config.json").read_text())["sample_size"],
        training=training_text(folder),
        unet_mb=(folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6,
        text_mb=(folder / "text_encoder" / "model.safetensors").stat().st_size / 1e6,
        results=render_card_results(results),
    )
    return str(ModelCard(text))


def benchmark(folder: Path) -> str:
    """Return the table of the rows whose results are in a folder."""
    files = [folder / f"{row}.json" for row in ROWS]
    return render_benchmark([json.loads(file.read_text()) for file in files if file.exists()])


def render(root: Path) -> dict[Path, str]:
    """Return the text of every file that this script writes."""
    texts = {file.with_name("README.md"): card(file.parent) for file in root.glob("model_cards/*/results.json")}
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
