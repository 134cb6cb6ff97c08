"""Alignment within the training of a UNet: its bottleneck meets the caption, or the features of a frozen vision model.

Both terms count at timesteps at which the image is still visible. Their heads are for the training alone: what is
saved is the UNet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from visbio_diffusers.alignment.training import gather_embeds
from visbio_diffusers.losses import contrastive_loss, denoising_errors, snr_weights, stratified_timesteps


VISIBLE = 0.2  # least share of the image in the variance of what the UNet sees
WIDTH = 128


class TokenAdapter(nn.Module):
    """Predicts the tokens of a vision model from those of the bottleneck.

    Args:
        dim, out_dim (`int`): width of the tokens, and of those to predict.
        mask_share (`float`): 0 is a perceptron on each token (REPA); above, so many tokens are hidden, and a
            transformer block fills them in, so that the bottleneck need not hold all details of each place.

    Source: Yu et al. 2024, Representation Alignment for Generation; masked, as in PixelREPA, arXiv 2603.14366.
    """

    def __init__(self, dim: int, out_dim: int, mask_share: float = 0.0):
        super().__init__()
        self.mask_share = mask_share
        self.mask_token = nn.Parameter(torch.zeros(dim)) if mask_share else None
        if mask_share:
            self.block = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        else:
            self.block = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.out = nn.Linear(dim, out_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, dim)` to `(batch, tokens, out_dim)`."""
        if self.mask_share:
            hidden = torch.rand(tokens.shape[:2], device=tokens.device) < self.mask_share
            tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.out(self.block(tokens))


class UNetWithHeads(nn.Module):
    """A `VisBioUNet` that keeps the tokens of its bottleneck, with heads on them.

    Args:
        unet (`VisBioUNet`): called as ever; saved by itself.
        captions (`bool`): whether it meets captions.
        vision_width (`int`): width of the tokens of the vision model that it meets; 0 for none.
        mask_share (`float`): see [`TokenAdapter`].
    """

    def __init__(self, unet, captions: bool = True, vision_width: int = 0, mask_share: float = 0.0):
        super().__init__()
        self.unet, self.tokens = unet, None
        dim = unet.config.block_out_channels[-1]
        if captions:
            self.image_head, self.text_head = nn.Linear(dim, WIDTH), nn.Linear(unet.config.cross_attention_dim, WIDTH)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.adapter = TokenAdapter(dim, vision_width, mask_share) if vision_width else None
        unet.mid_block.norm_out.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output) -> None:
        self.tokens = output

    def forward(self, *args, **kwargs):
        """Call the UNet."""
        return self.unet(*args, **kwargs)


def joint_loss(accelerator: Accelerator, scheduler, config, vision_model=None):
    """Return the loss function for `fit` on a [`UNetWithHeads`]: denoising, and what `config` gives a weight.

    Args:
        accelerator, scheduler: see `denoising_loss`.
        config: with `alignment_weight` and `repa_weight`.
        vision_model (`torch.nn.Module`, *optional*): frozen; returns `last_hidden_state` for pixel values.
    """
    weights = snr_weights(scheduler.alphas_cumprod, config.snr_gamma, scheduler.config.prediction_type)

    def loss_fn(model: nn.Module, batch: dict[str, Any]):
        pixel_values, states, mask = batch["pixel_values"], batch["encoder_hidden_states"], batch["mask"]
        with accelerator.autocast():
            noise = torch.randn_like(pixel_values)
            steps = stratified_timesteps(len(noise), scheduler.config.num_train_timesteps, noise.device)
            errors = denoising_errors(model, scheduler, pixel_values, noise, steps, states, mask)
            loss = (errors * weights.to(errors)[steps]).mean()
            metrics = {"denoising": loss.detach()}
            heads, visible = accelerator.unwrap_model(model), scheduler.alphas_cumprod.to(noise)[steps] >= VISIBLE
            if config.repa_weight:
                with torch.no_grad():
                    targets = vision_model(pixel_values).last_hidden_state
                metrics["repa"] = token_distance(heads.adapter(heads.tokens), targets, visible)
                loss = loss + config.repa_weight * metrics["repa"]
        if config.alignment_weight:  # logits of half precision would be too coarse
            metrics["alignment"] = _caption_loss(accelerator, heads, states, mask, batch["groups"], visible)
            loss = loss + config.alignment_weight * metrics["alignment"]
        return loss, metrics

    return loss_fn


def _caption_loss(accelerator, heads, states, mask, groups, visible) -> torch.Tensor:
    """Return the contrastive loss of pooled bottleneck and caption, of which those of one class fit each other.

    Images that are not visible take no part, nor do captions that were left out.
    """
    share = mask.to(states.dtype)[..., None] / mask.sum(dim=1)[:, None, None]
    embeds = heads.image_head(heads.tokens.float().mean(dim=1)), heads.text_head((states * share).sum(dim=1))
    images, texts = (gather_embeds(accelerator, F.normalize(each, dim=1)) for each in embeds)
    of_images, of_texts = (accelerator.gather(each) for each in (torch.where(visible, groups, -1), groups))
    matching = of_images[:, None] == of_texts
    seen, said = of_images >= 0, of_texts >= 0
    scale = heads.logit_scale.clamp(max=math.log(100)).exp()
    loss = contrastive_loss(images[seen], texts[said], scale, matching[seen][:, said])
    return loss + 0 * (images.sum() + texts.sum() + scale)  # a gradient, if none but zero, where nothing is seen


def token_distance(predicted: torch.Tensor, targets: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1 minus the cosine of tokens `(batch, n, width)` over those images that are visible.

    Targets on another square grid are resized to that of the predictions; those before the grid, such as the class
    token of a ViT, are left out.
    """
    if predicted.shape[1] != targets.shape[1]:
        side, wanted = (math.isqrt(each.shape[1]) for each in (targets, predicted))
        grid = targets[:, -side * side :].float().transpose(1, 2).unflatten(2, (side, side))
        targets = F.interpolate(grid, (wanted, wanted), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    distances = 1 - F.cosine_similarity(predicted.float(), targets.float(), dim=2).mean(dim=1)
    return (distances * visible).sum() / visible.sum().clamp(min=1)
