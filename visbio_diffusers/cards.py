"""Model cards from files: prose of one's own, and beside it what commands have recorded; no number is typed by hand.

`about.md` in the folder of a model holds the prose, with the Hub's metadata (licence, data sets, base model) at its
head. Added are how it was trained (training.json), what was measured (results.json of `visbio evaluate`, audit.json of
`visbio audit`, restoration.json of `evaluate_reconstruction.py`, and those of SECTIONS; of an adapter also
base_results.json, the classes of its base), and metrics in the form of the Hub.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from visbio_diffusers.alignment.measures import render_alignment
from visbio_diffusers.data import list_datasets
from visbio_diffusers.evaluation.counts import render_counts
from visbio_diffusers.evaluation.downstream import render_low_data
from visbio_diffusers.evaluation.report import cell, render_card_results
from visbio_diffusers.evaluation.restoration import render_restoration
from visbio_diffusers.evaluation.samplers import render_samplers
from visbio_diffusers.evaluation.speed import render_speed
from visbio_diffusers.evaluation.subtypes import render_subtypes
from visbio_diffusers.evaluation.tuning import render_tuning
from visbio_diffusers.load import DEFAULT_MODEL, LORA_WEIGHTS


ABOUT, CARD, TRAINING = "about.md", "README.md", "training.json"
MEDMNIST = "albertvillanova/medmnist-v2"  # on the Hub
DEFAULT_ABOUT = """---
license: unknown
tags: [biology, synthetic]
---

# {name}

A text-to-image {kind}, trained by visbio_diffusers on {data}. Its images are synthetic; **not for clinical use**.
{grid}
```python
{use}
```

## Intended use and limits

For research: augmenting and balancing image sets, teaching, testing of image analysis. It knows what its training
images show, and draws something else where it is asked for more. Not for diagnosis.

## Data and licences

{licences}
"""
ENCODER_ABOUT = """---
license: unknown
tags: [biology]
library_name: transformers
pipeline_tag: feature-extraction
---

# {name}

A text encoder (BERT) for text-to-image models, trained by visbio_diffusers on the captions of {data} and {texts}.

## Intended use and limits

For `train_text_to_image.py --text_encoder`. It knows the words of its captions and texts; it is no model of language
for other ends.
"""
DUAL_ENCODER_ABOUT = """---
license: unknown
tags: [biology, synthetic]
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# {name}

A dual encoder of images and captions (CLIP), trained by visbio_diffusers on {data}. **Not for clinical use.**

```python
import visbio_diffusers  # its vision model
from PIL import Image
from transformers import AutoProcessor, VisionTextDualEncoderModel

model, processor = (each.from_pretrained("{{repo}}") for each in (VisionTextDualEncoderModel, AutoProcessor))
inputs = processor(text=["a round cell", "a long cell"], images=Image.new("RGB", (28, 28)), return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(dim=1))
```

`visbio describe` and `visbio search` take it by `--model`; its calibration and its limits are in `calibration.json`.

## Intended use and limits

For research: naming and finding images like those it was trained on. What it says of others is a guess, which
`visbio describe` marks as such.

## Data and licences

{licences}
"""
USE_PIPELINE = """from diffusers import DiffusionPipeline

import visbio_diffusers  # or without it: from_pretrained(..., custom_pipeline="{repo}", trust_remote_code=True)

pipe = DiffusionPipeline.from_pretrained("{repo}")
image = pipe({prompt}).images[0]"""
USE_ADAPTER = """{import}

pipe = {class}.from_pretrained({base})
pipe.load_lora_weights("{repo}")
image = pipe({prompt}).images[0]"""
LOOKS = {
    "pixels": "pixels",
    "shape": "brightness, turned, mirrored and moved",
    "features": "features learned without labels",
}


# What other scripts have measured: files with their pictures, `NAME*.png`, and the titles of their sections.
SECTIONS = {
    "subtypes": ("Subtypes", render_subtypes),
    "counts": ("Numbers of nuclei", render_counts),
    "low_data": ("Where real images are few", render_low_data),
    "samplers": ("Samplers, steps and guidance", render_samplers),
    "speed": ("Speed on a GPU", render_speed),
}


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a LoRA adapter and no pipeline."""
    return (folder / LORA_WEIGHTS).is_file() and not has_index(folder)


def has_index(folder: Path) -> bool:
    """Return whether a folder holds a pipeline."""
    return (folder / "model_index.json").is_file()


def base_of(folder: Path) -> str | None:
    """Return the model that an adapter was trained on, as it was named; None for the one that comes in the package."""
    base = _read(folder / TRAINING).get("config", {}).get("pretrained_model_name_or_path")
    ours = not base or base == DEFAULT_MODEL or Path(base).parts[-2:] == ("model_cards", DEFAULT_MODEL)
    return None if ours else base


def is_dual_encoder(folder: Path) -> bool:
    """Return whether a folder holds a dual encoder of images and texts."""
    return _read(folder / "config.json").get("model_type") == "vision-text-dual-encoder"


def render_card(folder: Path, repo: str | None = None) -> str:
    """Return the card of a trained pipeline, adapter or text encoder, as its README.md.

    Args:
        folder (`Path`): what was trained, with its training.json or about.md.
        repo (`str`, *optional*): what its users load, in the place of "{repo}" in about.md: a Hub id, or by default
            the folder; its last part is the title.

    Raises:
        OSError: if the folder holds neither training.json nor about.md.
        ValueError: if about.md has no valid metadata.
    """
    training, place = _read(folder / TRAINING), folder.resolve()
    repo = repo or (f"model_cards/{place.name}" if place.parent.name == "model_cards" else place.name)
    name, about = repo.split("/")[-1], folder / ABOUT
    text = about.read_text(encoding="utf-8") if about.exists() else _default_about(folder, training, name)
    card = ModelCard(text.replace("{repo}", repo), ignore_metadata_errors=False)
    parts = [card.text.strip(), "## Training\n\n" + training_text(folder, training)]
    results = _read(folder / "results.json")
    other = render_alignment if "summary" in results else render_tuning if "by_subtype" in results else None
    if other:
        parts.append("## Results\n\n" + other(results).strip())
        results = {}  # not those of visbio evaluate
    if results:
        parts.append("## Results\n\n" + render_card_results(results).strip())
    base_results = _read(folder / "base_results.json")
    if base_results:
        parts.append("## What it costs the classes of its base\n\n" + render_card_results(base_results).strip())
    audit = _read(folder / "audit.json")
    if audit:
        parts.append("## Memorization\n\n" + audit_text(audit))
    restoration = _read(folder / "restoration.json")
    if restoration:
        pictures = sorted(file.name for file in folder.glob("restoration_*.png"))
        shown = "".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n\n" for name in pictures)
        parts.append(f"## What it makes of given images\n\n{shown}{render_restoration(restoration).strip()}")
    for name_of_files, (title, render) in SECTIONS.items():
        files = sorted(folder.glob(f"{name_of_files}*.json"))
        pictures = sorted(file.name for file in folder.glob(f"{name_of_files}*.png"))
        shown = [f"![{picture.removesuffix('.png').replace('_', ' ')}]({picture})" for picture in pictures]
        tables = [render(_read(file)).strip() for file in files]
        parts += [f"## {title}\n\n" + "\n\n".join(shown + tables)] if files else []
    data = card_data(folder, card.data.to_dict(), training, results, name)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _default_about(folder: Path, training: dict, name: str) -> str:
    if not training:
        raise OSError(f"{folder} has neither {TRAINING} nor {ABOUT} to make a card of")
    config = training.get("config", {})
    sets = {Path(each).stem: licence_of(Path(each).stem) for each in config.get("dataset_name", [])}
    licences = "; ".join(f"{each}: {licence or 'licence unknown'}" for each, licence in sets.items())
    if "reward" in config:
        licences = (
            f"It was tuned by the reward {config['reward']}, on prompts of {config['prompts']}, and saw no images."
        )
    licences = licences or "Say here whose images these were, and under which licence."
    data = ", ".join(sets) or (f"the reward {config['reward']}" if "reward" in config else "images of its own")
    if is_dual_encoder(folder):
        return DUAL_ENCODER_ABOUT.format(name=name, data=data, licences=licences)
    if not is_adapter(folder) and not has_index(folder):
        texts = [Path(text).stem for text in config.get("corpus", [])]
        banks = " and ".join(config.get("caption_banks", [])) or "its own"
        return ENCODER_ABOUT.format(name=name, data=banks, texts=" and ".join(texts) or "no other texts")
    adapter = is_adapter(folder)
    prompts = config.get("validation_prompts") or ["a microscopy image"]
    use = (USE_ADAPTER if adapter else USE_PIPELINE).replace("{prompt}", json.dumps(prompts[0], ensure_ascii=False))
    base = base_of(folder)
    other = "from diffusers import DiffusionPipeline\n\nimport visbio_diffusers  # whose pipeline the base may be"
    use = use.replace("{import}", other if base else "from visbio_diffusers import VisBioPipeline, default_model")
    use = use.replace("{class}", "DiffusionPipeline" if base else "VisBioPipeline")
    use = use.replace("{base}", json.dumps(base) if base else "default_model()")
    return DEFAULT_ABOUT.format(
        name=name,
        kind="adapter" if adapter else "model",
        data=data,
        grid="\n![Synthetic images](grid.png)\n" if (folder / "grid.png").exists() else "",
        use=use,
        licences=licences,
    )


def licence_of(dataset: str) -> str | None:
    """Return the licence of a MedMNIST set, None for other sets."""
    return next((row["licence"] for row in list_datasets() if row["name"] == dataset), None)


def training_text(folder: Path, training: dict) -> str:
    """Return the command, the versions and the machine of the training, its notes, and the size of the weights."""
    lines = []
    if {"versions", "hardware", "git", "command"} <= set(training):
        versions = ", ".join(f"{name} {number}" for name, number in training["versions"].items())
        hardware = training["hardware"]["gpu"] or f"CPU, {training['hardware']['cpu']}"
        git = training["git"] or {}
        commit = (git.get("commit") or "none")[:12] + (" with changes" if git.get("dirty") else "")
        lines += [f"`{training['command']}`", f"Commit {commit}; {hardware}; {versions}."]
    notes = folder / "training_notes.md"
    lines += [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    weights = sorted(folder.rglob("*.safetensors"))
    sizes = (f"{file.relative_to(folder).as_posix()} {file.stat().st_size / 1e6:.1f} MB" for file in weights)
    return "\n\n".join([*lines, f"Weights: {', '.join(sizes)}."])


def audit_text(audit: dict) -> str:
    """Return the tables of near-copies and of the membership test."""
    lines = ["| Near-copies of training images, seen in | " + " | ".join(audit["near_copies"]["pixels"]) + " |"]
    lines.append("|" + " --- |" * (1 + len(audit["near_copies"]["pixels"])))
    for look, shares in audit["near_copies"].items():
        lines.append(f"| {LOOKS[look]} | " + " | ".join(cell(share) for share in shares.values()) + " |")
    lines += ["", "Each column: the share that counts as near among unseen real images, which is what to expect of"]
    lines.append(f"new images; n = {audit['n']} drawn and {audit['n_unseen']} unseen ones.")
    membership = audit["membership_inference"]
    if membership:
        lines[-1] += " Told by its loss which images it was trained on, an attacker is right with an AUC of "
        lines[-1] += f"{cell(membership['auc'])}, where 0.5 is a guess (n = {membership['auc']['n']})."
    return "\n".join([*lines, "", f"`{audit['command']}`"])


def card_data(folder: Path, given: dict, training: dict, results: dict, name: str) -> ModelCardData:
    """Return the metadata that the Hub reads: what about.md gives, and the measured values as its model-index."""
    facts = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "language": "en"} | given
    if is_adapter(folder):
        facts["tags"] = [*facts.get("tags", []), "lora"]
        if "/" in training.get("base_model", ""):  # a Hub id
            facts.setdefault("base_model", training["base_model"])
    if any(map(licence_of, training.get("config", {}).get("dataset_name", []))):
        facts.setdefault("datasets", [MEDMNIST])
    return ModelCardData(**facts | {"model_name": name, "eval_results": eval_results(results) or None})


def eval_results(results: dict) -> list[EvalResult]:
    """Return the last run of a results.json in the form of the Hub's model-index."""
    if not results:
        return []
    run, found = results["runs"][-1], []
    for judge in results["evaluators"]:
        measured, name = run["evaluators"][judge["name"]], judge["name"]
        if "fidelity" in measured:
            value = measured["fidelity"]["overall"]["value"]
            found.append(("accuracy", f"Recognised as the class in the prompt ({name})", value))
        found.append(("frechet_distance", f"FD-{name}", measured["frechet"]["value"]["value"]))
        found.append(("coverage", f"Coverage ({name})", measured["manifold"]["generated"]["coverage"]["value"]))
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=re.sub(r"[^\w.-]+", "-", results["dataset"]),
            dataset_name=results["dataset"],
            dataset_split=results["split"]["reference"],
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for kind, title, value in found
    ]
