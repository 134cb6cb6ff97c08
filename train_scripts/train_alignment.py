"""Train a dual encoder of images and captions (CLIP, SigLIP), which tells what an image shows.

accelerate launch train_scripts/train_alignment.py --preset blood --dataset_name bloodmnist --output_dir runs/align
The folder OUTPUT_DIR/alignment loads with `transformers.VisionTextDualEncoderModel.from_pretrained`, and is what
`visbio describe --model` takes.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from visbio_diffusers import VisBioVisionModel, hub
from visbio_diffusers.alignment import DualEncoder
from visbio_diffusers.alignment.training import FITS_NOTHING, alignment_loss, clamp_hook, fit_calibration
from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import training_batches
from visbio_diffusers.data.corpus import foreign_sentences, read_corpus, split_sentences
from visbio_diffusers.data.pairs import CaptionPairs
from visbio_diffusers.evaluation import environment, write_results
from visbio_diffusers.image_sets import ImageSetsConfig, load_image_sets
from visbio_diffusers.load import DEFAULT_MODEL, load_text_encoder
from visbio_diffusers.models.vision_visbio import VisBioVisionConfig
from visbio_diffusers.training import (
    ema_hook,
    fit,
    make_accelerator,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    trainable,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(ImageSetsConfig):
    """Train a dual encoder of images and captions."""

    vision_model: str = flag("", "folder or Hub id of a vision model to start from; default is a new small one")
    hidden_sizes: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "channels of the stem and the stages of a new one"}
    )
    depths: list[int] = field(default_factory=lambda: [2], metadata={"help": "its blocks in each stage"})
    text_encoder: str = flag(DEFAULT_MODEL, "folder or Hub id of a BERT with its tokenizer; or a pipeline's folder")
    freeze_text_encoder: bool = flag(False, "train only the pooler and the projection of the text")
    projection_dim: int = flag(128, "width of the space that images and texts share")
    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "texts on other things (.jsonl, .csv, .txt), whose sentences fit no image"},
    )
    corpus_share: float = flag(0.25, "such sentences in a batch, as a share of its captions")
    loss: Literal["clip", "siglip"] = flag("clip", "tell pairs from all others of the batch, or judge each by itself")
    max_length: int = flag(64, "tokens of a caption in training")

    def __post_init__(self) -> None:
        """Check the settings of this script too."""
        super().__post_init__()
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1: a pair is told from the others of its micro-batch alone, so "
                "accumulated ones are no larger batch; raise --train_batch_size, or launch more processes"
            )
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is not for dual encoders, which are small")
        if not 0 <= self.corpus_share <= 1:
            raise ValueError(f"corpus_share must be in [0, 1], got {self.corpus_share}")
        if len(self.hidden_sizes) != len(self.depths) + 1:
            raise ValueError(f"hidden_sizes {self.hidden_sizes} must be one more than depths {self.depths}: the stem")


PRESETS = {
    "tiny": dict(
        hidden_sizes=[16, 32], depths=[1], max_train_samples=64, train_batch_size=8, captions_per_class=8,
        report_to="none",
    ),
    "blood": dict(
        freeze_text_encoder=True, train_batch_size=128, max_train_steps=1800, learning_rate=2e-3,
        lr_scheduler="cosine", lr_warmup_steps=200, adam_weight_decay=0.05, ema_decay=0.99, random_flip="dihedral",
        max_length=40, checkpointing_steps=200, checkpoints_total_limit=1,
    ),
}  # fmt: skip


def make_dual_encoder(config: AlignmentConfig) -> tuple[VisionTextDualEncoderModel, VisionTextDualEncoderProcessor]:
    """Return the two towers, with new projections, and their processor."""
    text_model, tokenizer = load_text_encoder(config.text_encoder)
    if getattr(text_model, "pooler", None) is None:
        raise ValueError(f"text_encoder {config.text_encoder} has no pooler: choose a BERT")
    if config.vision_model:
        vision_model = AutoModel.from_pretrained(config.vision_model, dtype=torch.float32)
        vision_model = getattr(vision_model, "vision_model", vision_model)  # of a CLIP
        if not isinstance(getattr(vision_model.config, "hidden_size", None), int):
            raise ValueError(f"vision_model {config.vision_model} has no hidden_size: choose a ViT, or a CLIP")
    else:
        shape = {"hidden_sizes": config.hidden_sizes, "depths": config.depths, "image_size": config.resolution}
        vision_model = VisBioVisionModel(VisBioVisionConfig(**shape))
    model = VisionTextDualEncoderModel(vision_model=vision_model, text_model=text_model)
    width = config.projection_dim
    model.config.projection_dim = model.projection_dim = width
    model.visual_projection = nn.Linear(model.vision_embed_dim, width, bias=False)
    model.text_projection = nn.Linear(model.text_embed_dim, width, bias=False)
    if config.loss == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    if config.freeze_text_encoder:
        text_model.requires_grad_(False).pooler.requires_grad_(True)
    side = {"height": config.resolution, "width": config.resolution}
    images = ViTImageProcessorPil(size=side, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model.train(), VisionTextDualEncoderProcessor(images, tokenizer)


def read_foreign(config: AlignmentConfig, pairs: CaptionPairs) -> list[str]:
    """Return the sentences of the corpus that speak of other things than the captions."""
    sentences = [each for path in config.corpus for text in read_corpus(path) for each in split_sentences(text)]
    if not sentences:
        return []
    foreign = foreign_sentences(sentences, [text for pool in pairs.pools.values() for text in pool])
    logger.info(f"{len(foreign)} of {len(sentences)} sentences of the corpus speak of other things")
    return foreign


def make_stream(datasets, pairs: CaptionPairs, tokenizer, accelerator, config: AlignmentConfig):
    """Return a stream for `fit`: images and tokens, with the meanings of both."""
    foreign = read_foreign(config, pairs)
    count = round(config.corpus_share * config.train_batch_size) if foreign else 0

    def stream(start: int) -> Iterator[dict[str, Any]]:
        batches = training_batches(
            datasets, config.dataset_weights or None, pairs.caption, config.train_batch_size, config.seed, start,
            accelerator.process_index, accelerator.num_processes, config.random_flip, config.dataloader_num_workers,
        )  # fmt: skip
        for index, batch in enumerate(batches, start):
            rng = np.random.default_rng([config.seed, index, accelerator.process_index])
            others = [foreign[row] for row in rng.integers(len(foreign), size=count)] if count else []
            texts, length = batch["captions"] + others, config.max_length
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            meanings = torch.cat([pairs.of_captions(batch["captions"]), torch.tensor([FITS_NOTHING]).repeat(count, 1)])
            yield {
                "pixel_values": batch["pixel_values"],
                "input_ids": tokens["input_ids"],
                "attention_mask": tokens["attention_mask"],
                "image_meanings": pairs.of_images(batch["sources"]),
                "caption_meanings": meanings,
            }

    return stream


def save_alignment(model, processor, config: AlignmentConfig, datasets, validation) -> Path:
    """Write the model with its calibration to OUTPUT_DIR/alignment, whole or not at all, and return that."""
    if config.loss == "siglip":
        model.config.logit_bias = model.logit_bias.item()
        del model.logit_bias

    def write(folder: Path) -> None:
        if validation is not None:
            fit_calibration(folder, DualEncoder(model.eval(), processor), datasets[0], validation)
        (model.half() if config.save_dtype == "fp16" else model).save_pretrained(folder)
        file = folder / "config.json"  # transformers would load it in fp16, whose images must be of fp16 too
        file.write_text(re.sub(r'"dtype": "\w+"', '"dtype": "float32"', file.read_text()))
        processor.save_pretrained(folder)
        banks = list(dict.fromkeys(dataset.bank for dataset in datasets if dataset.bank))  # the first was calibrated
        write_results({**environment(), "config": asdict(config), "caption_banks": banks}, folder / "training.json")

    return save_folder(Path(config.output_dir, "alignment"), write)


def validation_set(config: AlignmentConfig, datasets):
    """Return the validation split of the first set, None where it has no such split or no bank of one class each."""
    reason = "the first set has no caption bank of one class an image"
    if datasets[0].bank is not None and datasets[0].labels.ndim == 1:
        try:
            return load_image_sets(replace(config, dataset_name=config.datasets[:1], train_data_dir=""), 3, "val")[0]
        except ValueError as error:
            reason = str(error)
    logger.warning(f"neither calibrated nor able to say that none of its captions fits: {reason}")
    return None


def main(config: AlignmentConfig) -> int:
    """Train, and write the dual encoder; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    repo_id = hub.repo_of_training(config, accelerator.is_main_process)
    bare, processor = make_dual_encoder(config)
    datasets = load_image_sets(config, 3)
    validation = validation_set(config, datasets) if accelerator.is_main_process else None
    pairs = CaptionPairs(datasets, config.captions_per_class, config.seed)
    logger.info(
        f"{sum(map(len, datasets))} images, {sum(map(len, pairs.pools.values()))} captions; parameters: vision "
        f"{bare.vision_model.num_parameters() / 1e6:.2f} M, text {bare.text_model.num_parameters() / 1e6:.2f} M"
    )
    optimizer = make_optimizer(bare.parameters(), config)
    lr_scheduler = make_lr_scheduler(optimizer, config)
    if config.compile:
        bare.compile()
    model, optimizer = accelerator.prepare(bare, optimizer)
    ema = make_ema(accelerator, model, config) if config.use_ema else None
    hooks = [clamp_hook(bare), *([ema_hook(ema, bare)] if ema else [])]
    stream = make_stream(datasets, pairs, processor.tokenizer, accelerator, config)
    loss_fn = alignment_loss(accelerator)
    result = fit(accelerator, model, optimizer, lr_scheduler, stream, loss_fn, config, hooks)
    if accelerator.is_main_process and not result.signum:
        if ema:
            ema.copy_to(trainable(bare))
        hub.finish_training(save_alignment(bare, processor, config, datasets, validation), config, repo_id)
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(AlignmentConfig, PRESETS))
