"""The standard report: draw images from a model (or read some), measure them against a real set, write results.json.

Run by `visbio evaluate` and, on several processes, by `accelerate launch train_scripts/evaluate.py`.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.config import flag
from visbio_diffusers.data import ImageDataset, load_image_dataset
from visbio_diffusers.evaluation.evaluators import (
    EVALUATORS,
    Aligner,
    Evaluator,
    find_evaluators,
    images_hash,
    load_aligner,
    load_evaluators,
)
from visbio_diffusers.evaluation.extractors import load_extractor
from visbio_diffusers.evaluation.features import weights_hash
from visbio_diffusers.evaluation.images import Split, as_split, no_larger, read_images, save_images
from visbio_diffusers.evaluation.memorization import nearest_distances
from visbio_diffusers.evaluation.page import write_page
from visbio_diffusers.evaluation.protocol import (
    Reference,
    classification_accuracy_score,
    describe_aligner,
    describe_evaluators,
    make_reference,
    measure,
    measure_wording,
    real_training_images,
)
from visbio_diffusers.evaluation.report import environment, render_card_results, write_results
from visbio_diffusers.evaluation.sampling import (
    Drawn,
    Order,
    draw_on_cores,
    drawn_by,
    generate_images,
    peak_memory_gb,
    place_order,
    store_name,
)
from visbio_diffusers.files import digest, whole_file
from visbio_diffusers.grid import contact_sheet
from visbio_diffusers.load import check_device, load_pipeline, main_weights, training_sets
from visbio_diffusers.pipelines.defaults import call_default


logger = logging.getLogger(__name__)

SHEET_PER_CLASS = 12


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure generated images: fidelity, diversity, distance to real ones, near-copies, usefulness for training."""

    dataset_name: str = field(metadata={"help": "real images, splits train and test: flag, npz or folder"})
    output: str = field(
        metadata={"help": "JSON file for the results; the Markdown table and a page of HTML go beside it"}
    )
    caption_bank: str = flag("", "bank of a set that has none of its own: name, or YAML file")
    model: str = flag("", "folder or Hub id of the pipeline to measure")
    lora: str = flag("", "LoRA adapter to draw with: folder, file or Hub id")
    lora_scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "one or more weights of the adapter, each measured; 0 is without"},
    )
    images: str = flag("", "instead of a model: npz with train_images and train_labels, or a labelled image folder")
    num_images: int = flag(2048, "images to generate, as many of every class")
    num_wording_images: int = flag(256, "images to generate from held-out wording; 0 leaves them out")
    guidance_scale: list[float] = field(
        default_factory=list, metadata={"help": "one or more values, each measured; default is the pipeline's"}
    )
    guidance_interval: list[float] = field(
        default_factory=list, metadata={"help": "low and high share of the timesteps that are guided"}
    )
    num_inference_steps: int = flag(0, "denoising steps; 0 is the pipeline's default")
    batch_size: int = flag(64, "images generated at once")
    num_processes: int = flag(0, "processes that draw on a CPU; 0 is one for each of up to four cores")
    seed: int = flag(0, "seed of the generated images, the real images beside them, and the resampling")
    evaluators: str = flag("", "folder of judges, trained if empty; default: those shipped, or in runs/evaluators")
    extractors: list[str] = field(
        default_factory=list,
        metadata={"help": "more features: folders of Transformers' vision models (DINOv2), inception-2015-12-05.pt"},
    )
    evaluator_steps: int = flag(2000, "optimizer steps of an evaluator")
    cas_steps: int = flag(600, "optimizer steps of a classifier trained on the generated images alone")
    flip: bool = flag(True, "train classifiers on mirror images too; not where left and right are classes")
    cas: bool = flag(False, "also train a classifier on the generated images alone, which takes minutes")
    keep: bool = flag(False, "keep the generated images as npz beside the results")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to generate and to measure")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if bool(self.model) == bool(self.images):
            raise ValueError("give either --model or --images")
        drawing = (self.lora, self.guidance_scale, self.guidance_interval, self.num_inference_steps)
        if self.images and any(drawing):
            raise ValueError("lora, guidance_scale, guidance_interval and num_inference_steps need --model")
        if not self.lora_scale:
            raise ValueError("lora_scale must be one or more numbers")
        if min(self.num_images, self.batch_size, self.evaluator_steps, self.cas_steps) < 1:
            raise ValueError("num_images, batch_size, evaluator_steps and cas_steps must be at least 1")
        if min(self.num_wording_images, self.num_processes, self.seed) < 0 or self.num_wording_images == 1:
            raise ValueError("num_wording_images, num_processes and seed must be at least 0, the first not 1")
        if Path(self.output).suffix != ".json" or Path(self.output).is_dir():
            raise ValueError(f"output must be a file that ends in .json, got {self.output}")

    @property
    def store(self) -> Path:
        """Folder of the images of an evaluation that is under way."""
        return Path(self.output).with_suffix(".images")


class Sample(NamedTuple):
    """One set to measure: how it was drawn and its cost (`facts`), and its images, also those of held-out wording."""

    facts: dict
    plain: Split
    prompts: list[str] | None = None
    wording: Split | None = None
    wording_prompts: list[str] | None = None


def evaluate(config: EvaluateConfig) -> int:
    """Measure, write the results anew after every set, and return 0; the settings are those of `EvaluateConfig`.

    Raises:
        ValueError: for settings, images or models that cannot be measured; the message names the way out.
        OSError: if something cannot be read or written.
    """
    started, state = time.perf_counter(), PartialState()
    check_device(config.device)
    real = check_real(_load_real(config, "test"), bool(config.model))
    extractors = load_extractors(config.extractors, config.device)
    facts: dict[str, Any] = {}
    if config.model:
        pipe, facts = load_pipeline(config.model, _own_device(config, state), lora=config.lora)
        warn_of_other_splits(config.model, config.dataset_name, config.lora)
        options = drawing_options(pipe, config)
        order = place_order(real, config.num_images, config.num_wording_images, config.seed)
        labels = order.labels
        example = Split(generate_images(pipe, order.prompts[:1], config.seed, 1, **options[0]).images, labels[:1])
    else:
        example = no_larger(read_images(config.images, real.class_names, real.bank), real)
        labels = example.labels
    if state.is_main_process:  # before the drawing, so that nobody waits for a refusal
        reference, aligner = prepare_reference(config, no_larger(example, real).images, labels, extractors)
        check_independent([*reference.evaluators, aligner], facts)
    samples = draw_samples(pipe, facts, order, options, config) if config.model else [Sample({}, example)]
    if not state.is_main_process:
        return 0
    results = {
        **environment(),
        "source": facts.get("model") or config.images,
        "model_sha256": facts.get("model_sha256"),
        **{name: facts[name] for name in ("lora", "lora_sha256") if name in facts},
        "processes": state.num_processes,
        "dataset": real.name,
        "split": {"reference": "test", "num_train": len(reference.train.labels), "num_test": len(real)},
        "seed": config.seed,
        "evaluators": describe_evaluators(reference),
        "alignment_evaluator": describe_aligner(aligner, reference, real.captions),
        "runs": [],
    }
    if config.cas:
        score = classification_accuracy_score(real_training_images(reference), reference, config.cas_steps)
        results["real_training_images"] = {"classification_accuracy_score": score}
    for sample in samples:
        plain = no_larger(sample.plain, real)
        wording = sample.wording and no_larger(sample.wording, real)
        sample = sample._replace(plain=plain, wording=wording)
        results["runs"].append(_measured(sample, reference, aligner, config))
        results["wall_clock_seconds"] = time.perf_counter() - started
        write_results(results, config.output)
        with whole_file(Path(config.output).with_suffix(".md")) as temporary:
            temporary.write_text(render_card_results(results), encoding="utf-8")
        if len(results["runs"]) == 1:
            pictures = _pictures(sample, reference)
        write_page(results, pictures, Path(config.output).with_suffix(".html"))
    if config.model:
        shutil.rmtree(config.store, ignore_errors=True)
    return 0


def check_real(real: ImageDataset, captions: bool) -> ImageDataset:
    """Return a real set that can be a reference: one class an image, and words for them where `captions` are needed.

    Raises:
        ValueError: if it cannot.
    """
    if real.labels is None or real.labels.ndim != 1:
        raise ValueError(f"{real.name} needs one class label per image to be a reference")
    if real.class_names is None or (captions and real.bank is None and real.captions is None):
        raise ValueError(f"{real.name} has no captions for its classes: name a --caption_bank")
    return real


def warn_of_other_splits(model: str, dataset_name: str, lora: str = "") -> None:
    """Say so where a model was trained on a set of another name: what is called unseen may be what it has seen."""
    trained_on = [Path(name).stem for name in training_sets(model, lora)]
    if trained_on and Path(dataset_name).stem not in trained_on:
        logger.warning(
            f"{model} was trained on {', '.join(trained_on)}, and is held against {dataset_name}: if the two share "
            "images, its test split is not unseen"
        )


def drawing_options(pipe: DiffusionPipeline, config: EvaluateConfig) -> list[dict]:
    """Return the keyword arguments of the pipeline's call for every set to draw.

    Raises:
        ValueError: if the pipeline draws without text, or does not take what was asked for.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    options = {"num_inference_steps": config.num_inference_steps, "guidance_interval": config.guidance_interval}
    options = {name: value for name, value in options.items() if value}
    sets = [options | scale for scale in [{"guidance_scale": value} for value in config.guidance_scale] or [{}]]
    for name in ("prompt", "generator", *sets[0]):
        if name not in takes:
            raise ValueError(f"{type(pipe).__name__} takes no {name}, so it cannot be measured like this")
    return sets


def draw_samples(
    pipe: DiffusionPipeline, facts: dict, order: Order, options: list[dict], config: EvaluateConfig
) -> list[Sample]:
    """Draw the images of every set of `options`, by plain prompts and by held-out wording."""
    labels, prompts, wording_labels, wording_prompts = order
    drawer = drawn_by(pipe, facts)
    alone = PartialState().num_processes == 1 and pipe.device.type == "cpu"
    small = isinstance(pipe, VisBioPipeline)  # so that several fit into memory
    processes = config.num_processes or (min(torch.get_num_threads(), 4) if small else 1)
    processes = processes if alone else PartialState().num_processes

    def draw(texts: list[str], seed: int, chosen: dict, scale: float) -> tuple[Drawn, float | None]:
        of_adapter = [scale] if config.lora else []
        store = config.store / store_name(drawer, texts, seed, config.batch_size, chosen, *of_adapter)
        settings = {"first_seed": seed, "batch_size": config.batch_size, "store": store, **chosen}
        if pipe.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pipe.device)
        memory = None
        if config.lora:
            pipe.set_adapters("lora", scale)
        if alone and processes > 1:
            worker = config.model, "cpu", "float32", config.lora, scale
            memory = draw_on_cores(worker, texts, processes=processes, **settings)
        drawn = generate_images(pipe, texts, **settings)
        if pipe.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(pipe.device) / 2**30
        return drawn, memory or peak_memory_gb()

    defaults = inspect.signature(type(pipe).__call__).parameters
    samples = []
    for chosen, scale in itertools.product(options, config.lora_scale if config.lora else [1.0]):
        drawn, memory = draw(prompts, config.seed, chosen, scale)
        used = {
            name: chosen.get(name, call_default(pipe, name))
            for name in ("guidance_scale", "guidance_interval", "num_inference_steps")
            if name in defaults
        }
        used |= {"lora_scale": scale} if config.lora else {}
        cost = {"seconds_per_image": drawn.seconds_per_image, "peak_memory_gb": memory, "processes": processes}
        wording = None
        if wording_prompts:
            wording = Split(draw(wording_prompts, config.seed + len(labels), chosen, scale)[0].images, wording_labels)
        facts_of_run = used | {"scheduler": type(pipe.scheduler).__name__} | cost
        samples.append(Sample(facts_of_run, Split(drawn.images, labels), prompts, wording, wording_prompts))
    return samples


def load_extractors(sources: list[str], device: str) -> dict[str, tuple[nn.Module, str]]:
    """Return name -> network and source of the user's own extractors.

    Raises:
        ValueError: if two have one name, or that of a judge.
    """
    extractors: dict[str, tuple[nn.Module, str]] = {}
    for source in sources:
        name, extractor = load_extractor(source, device)
        if name in extractors or name in EVALUATORS:
            raise ValueError(f"there are two extractors named {name}: rename the folder or file {source}")
        extractors[name] = extractor, source
    return extractors


def prepare_reference(
    config: EvaluateConfig, example: np.ndarray, labels: np.ndarray, extractors: dict[str, tuple[nn.Module, str]]
) -> tuple[Reference, Aligner]:
    """Return real images of the form of `example` `(n, height, width, channels)`, with judges trained on them."""
    form = {"resolution": example.shape[1], "channels": example.shape[3]}
    real = [_load_real(config, split, **form) for split in ("train", "test")]
    names = real[0].class_names
    train, test = map(as_split, real)
    options = {"flip": config.flip, "device": config.device}
    folder = config.evaluators or find_evaluators(train) or Path("runs/evaluators", images_hash(train)[:12])
    judges = load_evaluators(folder, train, test, len(names), config.evaluator_steps, **options)
    for name, (extractor, source) in extractors.items():
        judges.append(Evaluator.of(name, extractor, {"source": source}, train, test))
    aligner = load_aligner(folder, real[0], train, config.evaluator_steps, **options)
    return make_reference(names, train, test, judges, labels, seed=config.seed, **options), aligner


def check_independent(evaluators: list[Evaluator | Aligner], facts: dict) -> None:
    """Refuse an evaluator that was the reward which the measured model was tuned with.

    Raises:
        ValueError: naming it.
    """
    rewards = facts.get("reward_sha256", "").split(", ")
    for judge in evaluators:
        source = judge.training.get("source")  # of an extractor
        files = main_weights(Path(source)) if source else []
        if {weights_hash(judge.model), digest(*files)} & set(rewards):
            raise ValueError(
                f"evaluator {judge.name} was the reward that this model was tuned with, so it would praise itself: "
                "name a folder of other --evaluators"
            )


def _load_real(config: EvaluateConfig, split: str, **form: int) -> ImageDataset:
    return load_image_dataset(config.dataset_name, split, caption_bank=config.caption_bank or None, **form)


def _own_device(config: EvaluateConfig, state: PartialState) -> str:
    several = config.device == "cuda" and state.num_processes > 1
    return f"cuda:{state.local_process_index}" if several else config.device


def _pictures(sample: Sample, reference: Reference) -> dict[str, Image.Image]:
    """Return sheets: the first images of every class, real ones in the same order, those nearest to training ones."""
    sheets = {}
    real = real_training_images(reference)
    for title, split in (("Generated images", sample.plain), ("Real training images", real)):
        rows = [row for k in np.unique(split.labels) for row in np.flatnonzero(split.labels == k)[:SHEET_PER_CLASS]]
        images = [Image.fromarray(split.images[row].squeeze()) for row in rows]
        captions = [reference.class_names[split.labels[row]] for row in rows]
        sheets[title] = contact_sheet(images, captions, SHEET_PER_CLASS, tile=84, caption_lines=1)
    distances, nearest = nearest_distances(sample.plain.images, reference.train.images, device=reference.device)
    pairs, captions = [], []
    for row in np.argsort(distances)[: SHEET_PER_CLASS * 2]:
        pair = sample.plain.images[row], reference.train.images[nearest[row]]
        for kind, image in zip(("generated", "training"), pair, strict=True):
            pairs.append(Image.fromarray(image.squeeze()))
            captions.append(f"{kind} {distances[row]:.2f}")
    title = "Nearest to a training image, each beside it, with the distance of their pixels in [0, 1]"
    sheets[title] = contact_sheet(pairs, captions, SHEET_PER_CLASS, tile=84, caption_lines=1)
    return sheets


def _measured(sample: Sample, reference: Reference, aligner: Aligner, config: EvaluateConfig) -> dict:
    result = dict(sample.facts)
    if config.keep and sample.prompts:
        chosen = {"guidance": sample.facts.get("guidance_scale"), "adapter": sample.facts.get("lora_scale")}
        ends = "".join(f"-{name}-{value:g}" for name, value in chosen.items() if value is not None)
        file = Path(config.output).with_name(f"{Path(config.output).stem}{ends}.npz")
        save_images(file, sample.plain, sample.prompts)
    result |= measure(sample.plain, reference, config.cas_steps if config.cas else 0)
    result["alignment"] = aligner(sample.plain, sample.prompts)
    if sample.wording is not None:
        result["heldout_wording"] = measure_wording(sample.wording, sample.wording_prompts, reference)
        result["heldout_wording_alignment"] = aligner(sample.wording, sample.wording_prompts)
    return result
