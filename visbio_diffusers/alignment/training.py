"""What the training of a dual encoder adds to the loop: its loss over all processes, its limits, its calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.nn import functional as distributed

from visbio_diffusers.alignment.dual_encoder import DualEncoder, write_calibration
from visbio_diffusers.alignment.zero_shot import caption_ensembles, class_embeds
from visbio_diffusers.augmentation import vary_photographs
from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.data.pairs import matching_pairs
from visbio_diffusers.losses import contrastive_loss, sigmoid_contrastive_loss


MAX_SCALE = 100.0
FITS_NOTHING = (-1, 0)  # number of no class, and of no subtype


def gather_embeds(accelerator: Accelerator, embeds: torch.Tensor) -> torch.Tensor:
    """Return the rows `(n * processes, width)` of all processes, through which gradients flow back to each.

    Every process then has the loss of the whole batch, and the mean of their gradients is its gradient.
    """
    return embeds if accelerator.num_processes == 1 else torch.cat(distributed.all_gather(embeds.contiguous()))


def alignment_loss(accelerator: Accelerator, kind: str) -> Callable[[nn.Module, dict[str, Any]], tuple]:
    """Return the loss function for `fit`.

    Args:
        accelerator: its autocast is used, its processes share one batch.
        kind (`str`): "clip" or "siglip"; the second needs a parameter `logit_bias` of the model.

    Batches hold `pixel_values`, `input_ids` and `attention_mask` of captions and of texts that fit no image, and the
    meanings `image_meanings` and `caption_meanings` of `CaptionPairs`, those of such texts being `FITS_NOTHING`.
    """

    def loss_fn(model: nn.Module, batch: dict[str, Any]):
        with accelerator.autocast():
            images = vary_photographs(batch["pixel_values"])
            out = model(batch["input_ids"], images, batch["attention_mask"])
        image_embeds, text_embeds = (gather_embeds(accelerator, each.float()) for each in (out[3], out[2]))
        meanings = (accelerator.gather(batch[name]) for name in ("image_meanings", "caption_meanings"))
        matching = matching_pairs(*meanings)
        bare = accelerator.unwrap_model(model)
        scale = bare.logit_scale.exp()
        if kind == "siglip":
            loss = sigmoid_contrastive_loss(image_embeds, text_embeds, scale, bare.logit_bias, matching)
        else:
            loss = contrastive_loss(image_embeds, text_embeds, scale, matching)
        with torch.no_grad():
            nearest = (image_embeds @ text_embeds.T).argmax(dim=1, keepdim=True)
            found = matching.gather(1, nearest).float().mean()
        return loss, {"found": found, "logit_scale": scale.detach()}

    return loss_fn


def clamp_hook(model: nn.Module):
    """Return a hook for `fit` that keeps the scale of the logits between 1 and 100, as CLIP does."""

    def hook(step: int, metrics: dict[str, Any]) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(MAX_SCALE))

    return hook


def fit_calibration(folder: Path, encoder: DualEncoder, train: ImageDataset, validation: ImageDataset) -> None:
    """Fit the calibration of a dual encoder to two splits of a set with a caption bank, and write it to its folder."""
    seen, unseen = ((_features(encoder, split), torch.as_tensor(split.labels)) for split in (train, validation))
    classes = class_embeds(encoder, list(caption_ensembles(load_bank(train.bank)).values()))
    write_calibration(folder, encoder, train.name, seen, (*unseen, classes))


def _features(encoder: DualEncoder, dataset: ImageDataset) -> torch.Tensor:
    return encoder.features([dataset[i]["image"] for i in range(len(dataset))])
