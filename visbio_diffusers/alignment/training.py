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

    Every process then has the loss of the whole batch, and the mean of their gradients is its gradient (batch norm
    within a model still sees the images of its own process alone).
    """
    return embeds if accelerator.num_processes == 1 else torch.cat(distributed.all_gather(embeds.contiguous()))


def shared_loss(
    accelerator: Accelerator,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    meanings: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the contrastive loss of the batches of all processes together, the same on each.

    Args:
        accelerator (`Accelerator`): of the processes.
        image_embeds (`torch.Tensor` of shape `(n, width)`), text_embeds (`(m, width)`): of this process, of length 1.
        meanings (`tuple` of `torch.Tensor`, `(n, 2)` and `(m, 2)`): of images and texts, see `CaptionPairs`.
        scale (`torch.Tensor`): factor of the cosines.
        bias (`torch.Tensor`, *optional*): takes SigLIP's loss in the place of CLIP's.

    Returns:
        The loss, and the share of images whose nearest text fits.
    """
    image_embeds, text_embeds = (gather_embeds(accelerator, each.float()) for each in (image_embeds, text_embeds))
    matching = matching_pairs(*(accelerator.gather(each) for each in meanings))
    if bias is None:
        loss = contrastive_loss(image_embeds, text_embeds, scale, matching)
    else:
        loss = sigmoid_contrastive_loss(image_embeds, text_embeds, scale, bias, matching)
    with torch.no_grad():
        nearest = (image_embeds @ text_embeds.T).argmax(dim=1, keepdim=True)
    return loss, matching.gather(1, nearest).float().mean()


def alignment_loss(accelerator: Accelerator) -> Callable[[nn.Module, dict[str, Any]], tuple]:
    """Return the loss function for `fit` on a `VisionTextDualEncoderModel`; one with a `logit_bias` gets SigLIP's.

    Batches hold `pixel_values`, `input_ids` and `attention_mask` of captions and of texts that fit no image, and the
    meanings `image_meanings` and `caption_meanings` of `CaptionPairs`, those of such texts being `FITS_NOTHING`.
    """

    def loss_fn(model: nn.Module, batch: dict[str, Any]):
        images = vary_photographs(batch["pixel_values"])
        with accelerator.autocast():
            out = model(batch["input_ids"], images, batch["attention_mask"])
        bare = accelerator.unwrap_model(model)
        meanings, scale = (batch["image_meanings"], batch["caption_meanings"]), bare.logit_scale.exp()
        bias = getattr(bare, "logit_bias", None)
        loss, found = shared_loss(accelerator, out.image_embeds, out.text_embeds, meanings, scale, bias)
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
