"""Group norm and pixel shuffle that leave channels-last images channels-last when they are compiled.

PyTorch's own return rows of one channel on a GPU, so that each convolution copies its input back, twice in training.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _is_kept(images):
    return torch.compiler.is_compiling() and images.is_contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, affine; compiled for channels-last images it keeps their layout and dtype."""

    def forward(self, hidden_states):
        """Normalise (B, C, H, W); statistics are in float32."""
        if not _is_kept(hidden_states):
            return super().forward(hidden_states)
        rows = hidden_states.permute(0, 2, 3, 1).float()  # (B, H, W, C)
        variance, mean = torch.var_mean(rows, dim=(1, 2), correction=0)  # of channels, whose rows are read as they lie
        variance, mean, weight, bias = (
            each.unflatten(-1, (self.num_groups, -1))
            for each in (variance, mean, self.weight.float(), self.bias.float())
        )
        between, mean = torch.var_mean(mean, dim=2, correction=0, keepdim=True)  # (B, G, 1)
        scale = weight * torch.rsqrt(variance.mean(dim=2, keepdim=True) + between + self.eps)  # (B, G, C / G)
        shift = bias - mean * scale
        scale, shift = (each.flatten(1)[:, None, None] for each in (scale, shift))
        return torch.addcmul(shift, rows, scale).to(hidden_states.dtype).permute(0, 3, 1, 2)


def pixel_shuffle(images, factor):
    """Turn (B, C * factor^2, H, W) into (B, C, factor * H, factor * W), as `torch.nn.functional.pixel_shuffle`."""
    if not _is_kept(images):
        return F.pixel_shuffle(images, factor)
    height, width = images.shape[-2:]
    parts = images.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor))  # (B, H, W, C, f, f)
    parts = parts.permute(0, 1, 4, 2, 5, 3)  # (B, H, f, W, f, C)
    return parts.reshape(len(images), factor * height, factor * width, -1).permute(0, 3, 1, 2)
