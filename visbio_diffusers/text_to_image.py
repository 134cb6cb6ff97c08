"""What the training of a text-to-image UNet and that of its adapters share: settings, captioned images, the loss."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag
from visbio_diffusers.data import ImageDataset, caption_pools, training_batches
from visbio_diffusers.data.pools import label_key
from visbio_diffusers.data.resident import ResidentImages, to_device
from visbio_diffusers.image_sets import ImageSetsConfig, load_image_sets
from visbio_diffusers.losses import diffusion_loss, snr_weights
from visbio_diffusers.text import EmbeddingCache, ResidentEmbeddings


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionedImagesConfig(ImageSetsConfig):
    """Settings of the training of a text-to-image model."""

    caption_dropout: float = flag(0.1, "share of empty captions, which guidance needs")
    snr_gamma: float = flag(0.0, "gamma of the min-SNR loss weight with a floor; 0 is off")
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "prompts to draw during training; default: the classes of the bank"}
    )
    num_validation_images: int = flag(4, "images of each validation prompt")
    validation_steps: int = flag(500, "draw every so many optimizer steps; 0 is never")
    resident_data: Literal["auto", "yes", "no"] = flag(
        "auto", "keep images and captions on the device that trains; auto does on a GPU with room for them"
    )

    def __post_init__(self) -> None:
        """Check the settings of the images too."""
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout}")
        super().__post_init__()


class CaptionedImages(NamedTuple):
    """What a training sees: the sets, their captions' embeddings, prompts for validation, and the stream for `fit`."""

    datasets: list[ImageDataset]
    embed: EmbeddingCache
    prompts: list[str]
    stream: Callable[[int], Iterator[dict[str, Any]]]

    @property
    def banks(self) -> list[str]:
        """Names of the caption banks whose classes are learned."""
        return sorted({load_bank(dataset.bank).name for dataset in self.datasets if dataset.bank})


def load_captioned_images(
    accelerator: Accelerator, config: CaptionedImagesConfig, channels: int, text_encoder, tokenizer
) -> CaptionedImages:
    """Load the training split of every set in one size, and encode each caption once; the encoder ends on the CPU.

    Raises:
        ValueError: for sets without captions, images that cannot be read, and what [`load_image_dataset`] refuses.
        OSError: if a set cannot be downloaded, or the cache not written.
    """
    datasets = load_image_sets(config, channels)
    caption_fn, captions = caption_pools(datasets, config.captions_per_class, config.seed)
    prompts = config.validation_prompts or _plain_captions(datasets)
    text_encoder.to(accelerator.device)
    texts, cache = list(dict.fromkeys(["", *captions, *prompts])), Path(config.output_dir, "cache")
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    embed = EmbeddingCache(texts, text_encoder, tokenizer, cache, **share, wait=accelerator.wait_for_everyone)
    text_encoder.to("cpu")
    logger.info(f"{sum(len(dataset) for dataset in datasets)} images, {len(captions)} captions")
    resident = _make_resident(datasets, embed, accelerator.device, config)
    return CaptionedImages(
        datasets, embed, prompts, _stream(datasets, caption_fn, embed, resident, accelerator, config)
    )


class Resident(NamedTuple):
    """Images and embeddings that are on the device already."""

    images: ResidentImages
    embeddings: ResidentEmbeddings


def _make_resident(datasets, embed: EmbeddingCache, device, config: CaptionedImagesConfig) -> Resident | None:
    """Put images and embeddings on the device, if asked to, or if it is a GPU and half its memory is enough."""
    if config.resident_data == "no" or (config.resident_data == "auto" and device.type != "cuda"):
        return None
    if config.resident_data == "auto":
        image_bytes = sum(map(len, datasets)) * datasets[0][0]["image"].nbytes
        free, _ = torch.cuda.mem_get_info(device)
        streamed = any(dataset.shard_starts is not None for dataset in datasets)
        if streamed or image_bytes + embed.nbytes > free / 2:
            logger.info("images and captions stay in the memory of the machine")
            return None
    return Resident(ResidentImages(datasets, device, config.random_flip), embed.resident(device))


def _stream(datasets, caption_fn, embed, resident: Resident | None, accelerator: Accelerator, config):
    """Return a stream for `fit`: images with the embeddings of their captions, some of which are empty."""

    def stream(start: int) -> Iterator[dict[str, Any]]:
        rank, device = accelerator.process_index, accelerator.device
        batches = training_batches(
            datasets, config.dataset_weights or None, caption_fn, config.train_batch_size, config.seed, start, rank,
            accelerator.num_processes, config.random_flip, config.dataloader_num_workers, decode=resident is None,
        )  # fmt: skip
        for index, batch in enumerate(batches, start):
            dropped = np.random.default_rng([config.seed, index, rank, 1]).random(config.train_batch_size)
            texts = ["" if u < config.caption_dropout else text for u, text in zip(dropped, batch["captions"])]
            if resident is None:
                pixel_values, (states, mask) = batch["pixel_values"], embed(texts)
            else:
                pixel_values = resident.images(batch["sources"], batch["orientations"])
                states, mask = resident.embeddings(to_device(resident.embeddings.rows(texts), device))
            groups = [_group(datasets, *each) for each in zip(batch["sources"], batch["labels"], texts)]
            yield {
                "pixel_values": pixel_values,
                "encoder_hidden_states": states,
                "mask": mask,
                "groups": to_device(torch.tensor(groups), device),
                "sources": to_device(torch.tensor(batch["sources"]), device),  # (batch, 2): the set, the image in it
            }

    return stream


def _group(datasets, source: tuple[int, int], label, caption: str) -> int:
    """Return a number that is the same for images of one class, or without classes of one caption; -1 without any."""
    own = datasets[source[0]].bank or source[0]
    return zlib.crc32(repr((own, caption if label is None else label_key(label))).encode()) if caption else -1


def _plain_captions(datasets: list[ImageDataset]) -> list[str]:
    """Return the plain caption of every class, or nothing for sets without a bank of one class per image."""
    banks = [load_bank(dataset.bank) for dataset in datasets if dataset.bank and dataset.labels.ndim == 1]
    return [bank.plain_caption(label) for bank in banks for label in range(len(bank.class_names))]


def denoising_loss(accelerator: Accelerator, scheduler, config: CaptionedImagesConfig):
    """Return the loss function for `fit`: the diffusion loss on batches of [`load_captioned_images`]."""
    weights = snr_weights(scheduler.alphas_cumprod, config.snr_gamma, scheduler.config.prediction_type)
    weights = weights.to(accelerator.device)  # once: a step that copies from the host waits for it

    def loss_fn(model, batch):
        with accelerator.autocast():
            states, mask = batch["encoder_hidden_states"], batch["mask"]
            return diffusion_loss(model, scheduler, batch["pixel_values"], states, mask, weights), {}

    return loss_fn
